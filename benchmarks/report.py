"""Results as text: the table that grows while the benchmark runs, and those of docs/benchmarks.md."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import fp8_report, models_report, records
from .grid import grid

COLUMN = 22
OWN_SECTION = ("fp8", "masks", "deterministic", "models", "features")  # the other suites share one


def _cell(result: dict[str, Any], name: str) -> str:
    """Speed, ratio to the baseline and, behind a slash, the speed back to back."""
    record = result["results"].get(name)
    if record is None:
        return ""
    if "refused" in record:
        return "refused"
    against = "" if record["ratio"] is None else f" {record['ratio']:.2f}x"
    if result.get("moved_bytes"):
        return f"{record['gb_per_s']:.0f} GB/s{against}"
    if not result["flops"]:
        return records.duration(record["ms"]) + against
    return f"{record['tflops']:.0f}{against} /{record['back_to_back_tflops']:.0f}"


def header(names: Sequence[str]) -> str:
    legend = "TFLOP/s or GB/s, ratio to the baseline (median of rounds), /TFLOP/s back to back"
    return f"{legend}\n{'':36}" + "".join(f"{name:<{COLUMN}}" for name in names)


def line(result: dict[str, Any], names: Sequence[str]) -> str:
    cells = "".join(f"{_cell(result, name):<{COLUMN}}" for name in names)
    return f"{result['name']:<36}{cells}{_expectation(result)}".rstrip()


def refusals(result: dict[str, Any]) -> list[str]:
    results = result["results"].items()
    return [f"    {name}: {record['refused']}" for name, record in results if "refused" in record]


def over_expected(result: dict[str, Any]) -> float | None:
    """Time over the share of the unmasked time that the visible blocks are."""
    record = records.ours(result)
    if result["visible_share"] is None or record.get("ratio") is None:
        return None
    return 1 / (record["ratio"] * result["visible_share"])


def _expectation(result: dict[str, Any]) -> str:
    over = over_expected(result)
    return "" if over is None else f"{over:.3f} of {result['visible_share']:.1%} of the blocks"


def _list(results: Iterable[dict[str, Any]]) -> list[str]:
    """One row per point: for the suites that are no grid of lengths."""
    lines = ["| point | time | TFLOP/s | against | times as fast |", "|---|---|---|---|---|"]
    for result in results:
        record = records.ours(result)
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
            f"| {result['name']} | {records.duration(record['ms'])} | {speed} | {against} | {factor} |"
        )
    return lines


_FEATURES = (
    "Against the closed form: of a dense mask that is causal and of random blocks of 128 × 128, half of them "
    "hidden, `is_causal`; of a window and the first keys the window alone; of sinks and slopes none. A bias is "
    "`[1, N, T, S]` in bf16, its gradient computed, too. TFLOP/s by what is visible:"
)


def _beside(results: Iterable[dict[str, Any]]) -> list[str]:
    """One row per point, with its baseline's speed."""
    lines = ["| point | time | TFLOP/s | against | its TFLOP/s | share |", "|---" * 6 + "|"]
    for result in results:
        name, record = result["baseline"], records.ours(result)
        other = result["results"].get(name, {})
        cells = [result["name"], "–", "–", name, "–", "–"]
        if "ms" in record:
            cells[1:3] = records.duration(record["ms"]), f"{record['tflops']:.0f}"
        if "ms" in other:
            cells[4] = f"{other['tflops']:.0f}"
        if "ms" in record and "ms" in other:
            cells[5] = f"{record['tflops'] / other['tflops']:.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def conditions(report: dict[str, Any]) -> str:
    """The machine, and its state before and after."""
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
    runs = [run for report in reports for run in (report, *report.get("others", ()))]
    others = [{k: v for k, v in run.items() if k not in ("points", "others")} for run in runs[1:]]
    points = [point for report in reports for point in report["points"]]
    return {**runs[0], "points": points, "others": others}


def markdown(report: dict[str, Any]) -> str:
    """The page's tables from a JSON report."""
    suites: dict[str, list[dict[str, Any]]] = {}
    for result in report["points"]:
        suites.setdefault(result["suite"], []).append(result)
    protocol = (
        f"Device time, {report['rounds']} rounds, one call of each contender in turn, L2 flushed and "
        "a pause between calls. 4·b·h·s²·d FLOPs forward, 2.5 times as many backward, half when causal."
    )
    runs = [conditions(run) for run in (report, *report.get("others", ()))]
    blocks = [f"{'. Then: '.join(runs)}. {protocol}"]
    shapes = "16,384 tokens, heads × head dim = 2048, by sequence length"
    for suite, results in suites.items():
        if suite in ("paper", "quick"):
            intro = (
                "TFLOP/s, in brackets times as fast as cuDNN (`jax.nn`, in the same rounds); bf16, "
                f"{shapes}:"
            )
            blocks.append("\n".join([intro, "", *grid(results)]))
        elif suite == "models":
            blocks.append(models_report.markdown(results))
        elif suite == "features":
            blocks.append("\n".join([_FEATURES, "", *_beside(results)]))
        elif suite == "fp8":
            blocks += fp8_report.tables(results, shapes)
        else:
            blocks.append("\n".join([f"Suite `{suite}`:", "", *_list(results)]))
    return "\n\n".join(blocks) + "\n"


def write_page(page: Path, report: dict[str, Any]) -> None:
    """Replaces the sections of docs/benchmarks.md that the report's suites are in."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for result in report["points"]:
        suite = result["suite"]
        section = f"benchmark-{suite}" if suite in OWN_SECTION else "benchmark"
        sections.setdefault(section, []).append(result)
    for section, results in sections.items():
        write_section(page, section, markdown({**report, "points": results}))


def markers(section: str) -> tuple[str, str]:
    """What the page has before and after a section."""
    return f"<!-- {section}: begin -->", f"<!-- {section}: end -->"


def write_section(page: Path, section: str, text: str) -> None:
    """Replaces what stands between the section's markers. Raises ValueError without them."""
    begin, end = markers(section)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    old = page.read_text(encoding="utf-8")
    new, count = pattern.subn(lambda _: f"{begin}\n{text}{end}", old)
    if count != 1:
        raise ValueError(f"{page}: expected one pair of {begin} and {end}, found {count}")
    page.write_text(new, encoding="utf-8")
