"""Tables by sequence length."""

from collections.abc import Iterable
from typing import Any

from . import records


def by_length(rows: dict[str, dict[int, str]]) -> list[str]:
    """A table of these rows, each with its cells by sequence length."""
    lengths = sorted({n for cells in rows.values() for n in cells})
    lines = ["| | " + " | ".join(str(n) for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(cells.get(n, "–") for n in lengths) + " |")
    return lines


def grid(
    results: Iterable[dict[str, Any]], beside: str | None = None, also: str | None = None
) -> list[str]:
    """One row per pass, head dim and mask, one column per length: TFLOP/s, ratio to the baseline and,
    behind semicolons, to the contender `beside`, and that of the contender `also` to the baseline."""
    title = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "both", "fp8": "FP8 forward"}
    rows: dict[str, dict[int, str]] = {}
    for result in results:
        record = records.ours(result)
        cell = "–"
        if "tflops" in record:
            ratios = [record["ratio"]] + ([records.ratio(result, beside)] if beside else [])
            if also in result["results"]:
                ratios.append(result["results"][also].get("ratio"))
            shown = "; ".join("–" if x is None else f"{x:.2f}" for x in ratios)
            cell = f"{record['tflops']:.0f}" + (f" ({shown})" if any(ratios) else "")
        name = f"{title[result['pass_name']]}, head dim {result['head_dim']}, {result['mask']}"
        rows.setdefault(name, {})[result["seqlen"]] = cell
    return by_length(rows)
