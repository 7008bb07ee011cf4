"""The tables of `--suite ring`."""

from typing import Any

from .report import conditions
from .ring_calls import ALONE, TWO_LEVEL

TITLES = {"fwd": "forward", "fwd+bwd": "forward and backward"}
# What `of_ideal` shall be at least, by GPUs and length.
BARS = {(8, 2**17): 0.90, (8, 2**19): 0.95, (8, 2**20): 0.95}


def setting(report: dict[str, Any]) -> str:
    """The machine, and what its GPUs send each other."""
    rate = report.get("link_gb_per_s")
    sent = "" if rate is None else f"; each GPU to the next at the same time: {rate:.0f} GB/s"
    return conditions(report) + sent


def markdown(report: dict[str, Any]) -> str:
    head = "| | GPUs | ms | TFLOP/s per GPU | of ideal | bar | temporary GB per GPU |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for result in report["points"]:
        for key, record in result["results"].items():
            strategy, devices = key.split()
            bar = None if strategy == ALONE else BARS.get((int(devices), result["seqlen"]))
            memory = record.get("temporary_bytes")
            cells = (
                f"{result['name']}, {strategy}",
                devices,
                f"{record['ms']:.2f}",
                f"{record['tflops_per_gpu']:.0f}",
                f"{record['of_ideal']:.3f}",
                "–" if bar is None else f"{bar:.2f}",
                "–" if memory is None else f"{memory / 1e9:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def grid(report: dict[str, Any]) -> str:
    """The page's table: one row per pass and strategy, one column per length and number of GPUs."""
    rows: dict[str, dict[str, str]] = {}
    bars: dict[str, str] = {}
    for result in report["points"]:
        for key, record in result["results"].items():
            strategy, devices = key.split()
            if strategy == ALONE:
                continue
            name = 'heads over 2, `"ring"`' if strategy == TWO_LEVEL else f'`"{strategy}"`'
            column = f"{devices} GPUs, {result['seqlen'] // 1024}k"
            row = rows.setdefault(f"{TITLES[result['pass_name']]}, {name}", {})
            row[column] = f"{record['tflops_per_gpu']:.0f} ({record['of_ideal']:.2f})"
            bar = BARS.get((int(devices), result["seqlen"]))
            if bar is not None:
                bars[column] = f"({bar:.2f})"
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [" | ".join(["| TFLOP/s per GPU (of ideal)", *columns]) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in (rows | ({"the bar": bars} if bars else {})).items():
        lines.append(" | ".join([f"| {name}", *(row.get(x, "–") for x in columns)]) + " |")
    return "\n".join(lines) + "\n"
