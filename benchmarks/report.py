"""Results as text: the table that grows while the benchmark runs, and the README's."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
COLUMN = 22


def _time(ms: float) -> str:
    return f"{ms * 1e3:.1f} µs" if ms < 1 else f"{ms:.3f} ms"


def _cell(result: dict[str, Any], name: str) -> str:
    """Speed, ratio to the baseline and, behind a slash, the speed back to back."""
    record = result["results"].get(name)
    if record is None:
        return ""
    if "refused" in record:
        return "refused"
    against = "" if record["ratio"] is None else f" {record['ratio']:.2f}x"
    if not result["flops"]:
        return _time(record["ms"]) + against
    return f"{record['tflops']:.0f}{against} /{record['back_to_back_tflops']:.0f}"


def header(names: Sequence[str]) -> str:
    legend = "TFLOP/s, ratio to the baseline (median of rounds), /TFLOP/s back to back"
    return f"{legend}\n{'':36}" + "".join(f"{name:<{COLUMN}}" for name in names)


def line(result: dict[str, Any], names: Sequence[str]) -> str:
    cells = "".join(f"{_cell(result, name):<{COLUMN}}" for name in names)
    return f"{result['name']:<36}{cells}{_expectation(result)}".rstrip()


def refusals(result: dict[str, Any]) -> list[str]:
    records = result["results"].items()
    return [f"    {name}: {record['refused']}" for name, record in records if "refused" in record]


def over_expected(result: dict[str, Any]) -> float | None:
    """Time over the share of the unmasked time that the visible blocks are."""
    record = result["results"][result["contenders"][0]]
    if result["visible_share"] is None or record.get("ratio") is None:
        return None
    return 1 / (record["ratio"] * result["visible_share"])


def _expectation(result: dict[str, Any]) -> str:
    over = over_expected(result)
    return "" if over is None else f"{over:.3f} of {result['visible_share']:.1%} of the blocks"


def _grid(results: Iterable[dict[str, Any]]) -> list[str]:
    """One row per pass, head dim and mask, one column per length: TFLOP/s and ratio."""
    results = list(results)
    lengths = sorted({r["seqlen"] for r in results})
    rows: dict[tuple[str, int, str], dict[int, str]] = {}
    for result in results:
        record = result["results"][result["contenders"][0]]
        cell = "–"
        if "tflops" in record:
            cell = f"{record['tflops']:.0f}"
            cell += "" if record["ratio"] is None else f" ({record['ratio']:.2f})"
        key = result["pass_name"], result["head_dim"], result["mask"]
        rows.setdefault(key, {})[result["seqlen"]] = cell
    title = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "both"}
    lines = ["| | " + " | ".join(str(n) for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for (pass_name, head_dim, mask), cells in rows.items():
        values = " | ".join(cells.get(n, "–") for n in lengths)
        lines.append(
            f"| {title.get(pass_name, pass_name)}, head dim {head_dim}, {mask} | {values} |"
        )
    return lines


def _list(results: Iterable[dict[str, Any]]) -> list[str]:
    """One row per point: for the suites that are no grid of lengths."""
    lines = ["| point | time | TFLOP/s | against | times as fast |", "|---|---|---|---|---|"]
    for result in results:
        record = result["results"][result["contenders"][0]]
        over = over_expected(result)
        against = f"{result['baseline']}" + (
            "" if over is None else f" × {result['visible_share']:.1%}"
        )
        if "ms" not in record:
            lines.append(f"| {result['name']} | – | – | {against} | – |")
            continue
        speed = f"{record['tflops']:.0f}" if result["flops"] else "–"
        faster = record["ratio"] if over is None else 1 / over
        factor = "–" if faster is None else f"{faster:.2f}"
        lines.append(
            f"| {result['name']} | {_time(record['ms'])} | {speed} | {against} | {factor} |"
        )
    return lines


def _conditions(report: dict[str, Any]) -> str:
    env = report["environment"]
    versions = env["versions"]
    cudnn = next((v for k, v in versions.items() if k.startswith("nvidia-cudnn")), "?")
    parts = [
        f"{env['gpu']}, driver {env.get('driver_version', '?')}",
        f"jax {versions.get('jax', '?')}, cuDNN {cudnn}, {env['date']}",
    ]
    for when in ("begin", "end"):
        state = report.get(when)
        if state:
            parts.append(
                f"{when}: bf16 8192³ matmul {state['matmul_tflops']:.0f} TFLOP/s, SM "
                f"{state.get('clocks.sm', '?')} MHz, {state.get('power.draw', '?')} W"
            )
    return "; ".join(parts)


def joined(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several runs; the first one's environment and rounds, every one's conditions."""
    first, *others = reports
    points = [point for report in reports for point in report["points"]]
    return {**first, "points": points, "others": others}


def markdown(report: dict[str, Any]) -> str:
    """The README's tables from a JSON report."""
    suites: dict[str, list[dict[str, Any]]] = {}
    for result in report["points"]:
        suites.setdefault(result["suite"], []).append(result)
    protocol = (
        f"Device time, {report['rounds']} rounds, one call of each contender in turn, L2 flushed and "
        "a pause between calls. 4·b·h·s²·d FLOPs forward, 2.5 times as many backward, half when causal."
    )
    runs = [_conditions(run) for run in (report, *report.get("others", ()))]
    blocks = [f"{'. Then: '.join(runs)}. {protocol}"]
    for suite, results in suites.items():
        if suite in ("paper", "quick"):
            intro = (
                "TFLOP/s, in brackets times as fast as cuDNN (`jax.nn`, in the same rounds); bf16, "
                "16,384 tokens, heads × head dim = 2048, by sequence length:"
            )
            blocks.append("\n".join([intro, "", *_grid(results)]))
        else:
            blocks.append("\n".join([f"Suite `{suite}`:", "", *_list(results)]))
    return "\n\n".join(blocks) + "\n"


def write_readme(readme: Path, report: dict[str, Any]) -> None:
    """Replaces what stands between the markers in the README. Raises ValueError without them."""
    text = readme.read_text(encoding="utf-8")
    made = f"{BEGIN}\n{markdown(report)}{END}"
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    text, count = pattern.subn(lambda _: made, text)
    if count != 1:
        raise ValueError(f"{readme}: expected one pair of {BEGIN} and {END}, found {count}")
    readme.write_text(text, encoding="utf-8")
