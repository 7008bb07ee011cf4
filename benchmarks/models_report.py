"""What a run of the suite of models says: its table, and which rows miss their bars.

The bars: every row against the best of its rivals, by its length in time; some rows against cuDNN; and
some against the TFLOP/s of another row.
"""

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from . import records

SHORT_MS = 0.06
SHORT = 0.97
LONG = {"fwd": 0.95, "bwd": 1.00}

_PAPER = "flashattention-3-paper-tp-1-2x8192"
_PACKED = "olmo-2-1b-packed-fine-tuning-tp-1-1x16384"

# Times as fast as cuDNN at least, by the point's name.
OF_CUDNN = {
    "bwd-llama-3-70b-tp-8-1x8192": 1.35,
    "bwd-llama-3-70b-tp-8-4x4096": 1.15,
    "bwd-qwen-3-30b-a3b-tp-1-2x4096": 1.15,
    "bwd-qwen-3-32b-tp-1-1x4096": 1.15,
    "bwd-qwen-3.5-397b-a17b-tp-2-1x4096": 1.15,
    "bwd-falcon-7b-tp-1-4x2048": 1.15,
    "bwd-siglip-so400m-896-px-tp-1-4x4096": 1.15,
    "bwd-perceiver-resampler-tp-1-8x512": 1.15,
    "bwd-gpt-oss-20b-window-layers-tp-1-16x4096": 1.15,
    "fwd-gpt-oss-20b-window-layers-tp-1-16x4096": 1.15,
    "fwd-llama-3-8b-tp-1-2x8192": 1.20,
    "bwd-llama-3-8b-tp-1-2x8192": 1.17,
    "fwd-deepseek-v3-tp-8-2x8192": 1.27,
    "bwd-deepseek-v3-no-mask-tp-8-2x8192": 1.50,
}


class Speed(NamedTuple):
    """This library's TFLOP/s at a point, as a share of a contender's at another."""

    point: str
    contender: str
    other: str
    least: float


SPEEDS = (
    Speed(f"fwd-{_PACKED}", "fa3", "fwd-olmo-2-1b-tp-1-8x2048", 0.95),
    Speed(f"bwd-{_PACKED}", "fa3", "bwd-olmo-2-1b-tp-1-8x2048", 0.95),
    Speed(f"fwd-{_PACKED}", "cudnn", f"fwd-{_PAPER}", 1.00),
    Speed("fwd-flashattention-3-paper-window-tp-1-2x8192", "cudnn", f"fwd-{_PAPER}", 0.93),
    Speed("fwd-flashattention-3-paper-fp16-tp-1-2x8192", "fa3", f"fwd-{_PAPER}", 0.94),
)

Results = Iterable[dict[str, Any]]


def bar(result: dict[str, Any]) -> float:
    """What the row has to be, at least, of the best of its rivals."""
    short = records.ours(result).get("ms", SHORT_MS) < SHORT_MS
    return SHORT if short else LONG[result["pass_name"]]


def misses(results: Results) -> list[str]:
    """One line for each bar that these results miss, or do not say anything about: a bar between two
    rows only where one of the two was measured."""
    by_name = {result["name"]: result for result in results}
    checks = [
        (name, "the best rival", records.of_the_best(result), bar(result))
        for name, result in by_name.items()
    ]
    for name, least in OF_CUDNN.items():
        if name in by_name:
            checks.append((name, "cuDNN", records.ratio(by_name[name], "cudnn"), least))
    for name, contender, other, least in SPEEDS:
        if name in by_name:
            mine = records.ours(by_name[name]).get("tflops")
            theirs = by_name.get(other, {}).get("results", {}).get(contender, {}).get("tflops")
            share = mine / theirs if mine and theirs else None
            checks.append((name, f"{contender}'s TFLOP/s at {other}", share, least))
    lines = []
    for name, whose, value, least in checks:
        if value is None:
            lines.append(f"{name}: not measured against {whose}, wanted {least:.2f}")
        elif value < least:
            lines.append(f"{name}: {value:.3f} of {whose}, wanted {least:.2f}")
    return lines


def summary(results: Results) -> list[str]:
    """A line for each pass: how its rows are beside their rivals."""
    results, lines = list(results), []
    for name, word in (("fwd", "Forward"), ("bwd", "Backward")):
        rows = [result for result in results if result["pass_name"] == name]
        spans = []
        for whose, of in (
            ("cuDNN", lambda result: records.ratio(result, "cudnn")),
            ("the better rival", records.of_the_best),
        ):
            shares = [share for result in rows if (share := of(result)) is not None]
            if shares:
                span = f"{min(shares):.2f} to {max(shares):.2f}"
                spans.append(
                    f"{span} times as fast as {whose}, median {statistics.median(shares):.2f}"
                )
        if spans:
            lines.append(f"{word}, {len(rows)} rows: {'; '.join(spans)}.")
    return lines


def shape(result: dict[str, Any]) -> str:
    keys = f" on {result['seqlen_k']}" if result["seqlen_k"] else ""
    dims = dict.fromkeys((result["head_dim"], result["head_dim_v"]))
    dim = str(*dims) if len(dims) == 1 else f"({', '.join(map(str, dims))})"
    heads = f"{result['num_heads_q']}/{result['num_heads_k']} × {dim}"
    dtype = ", fp16" if result["dtype"] == "float16" else ""
    return f"{result['batch']} × {result['seqlen']}{keys}, {heads}, {result['mask']}{dtype}"


def _cells(result: dict[str, Any] | None) -> list[str]:
    """Time and TFLOP/s; times as fast as cuDNN, dew as fast as cuDNN, and as fast as the better."""
    if result is None:
        return ["–"] * 4
    record = records.ours(result)
    if "ms" not in record:
        return ["refused", *["–"] * 3]

    def number(value: float | None, *names: str) -> str:
        if value is not None:
            return f"{value:.2f}"
        refused = any("refused" in result["results"].get(name, {}) for name in names)
        return "refused" if refused else "–"

    best = records.of_the_best(result)
    missed = best is not None and best < bar(result)
    dew = records.ratio(result, "cudnn", "dew")
    return [
        f"{records.duration(record['ms'])}, {record['tflops']:.0f}",
        number(records.ratio(result, "cudnn"), "cudnn"),
        number(dew, "dew"),
        f"**{best:.2f}**" if missed else number(best),
    ]


def markdown(results: Results) -> str:
    """Table, bars and picture."""
    results = list(results)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        rows.setdefault(result["name"].partition("-")[2], {})[result["pass_name"]] = result
    against = "× cuDNN | dew × cuDNN | × the better |"
    intro = (
        "One layer's attention on one device, TP: its share under tensor parallelism. Time and TFLOP/s "
        "of the pairs that are seen; times as fast as cuDNN, dew (FlashAttention-3's kernels) as fast "
        "as cuDNN, and times as fast as the better of the two, bold where that is under its bar. A "
        "window counts the keys besides the row's own."
    )
    lines = [
        intro,
        "",
        f"| of | batch × length, heads × head dim, mask | forward | {against} backward | {against}",
        "|---" * 10 + "|",
    ]
    for passes in rows.values():
        one = next(iter(passes.values()))
        cells = [one["model"], shape(one), *_cells(passes.get("fwd")), *_cells(passes.get("bwd"))]
        lines.append(f"| {' | '.join(cells)} |")
    missed = misses(results)
    lines += ["", *summary(results)]
    lines += [
        "",
        f"Bars: {LONG['bwd']:.2f} of the better rival backward and {LONG['fwd']:.2f} forward, "
        f"{SHORT:.2f} where a call takes less than {SHORT_MS * 1e3:.0f} µs; and some rows' own. "
        + ("Missed or not measured:" if missed else "Every one is met."),
        *([""] if missed else []),
        *(f"- {line}" for line in missed),
        "",
        "![Times as fast as the better rival](../benchmarks/results/models.png)",
    ]
    return "\n".join(lines)
