"""What one point's JSON record says."""

import statistics
from collections.abc import Iterable
from typing import Any


def duration(ms: float) -> str:
    return f"{ms * 1e3:.1f} µs" if ms < 1 else f"{ms:.3f} ms"


def ours(result: dict[str, Any]) -> dict[str, Any]:
    """The measurements of the contender that the figure is about."""
    return result["results"][result["contenders"][0]]


def ratio(result: dict[str, Any], other: str, name: str | None = None) -> float | None:
    """How many times as fast as `other` is `name` (None: the first contender): the median over the
    rounds; None where one of the two did not run."""
    records = [result["results"].get(x, {}) for x in (other, name or result["contenders"][0])]
    if any("times_ms" not in record for record in records):
        return None
    pairs = zip(*(record["times_ms"] for record in records), strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def of_the_best(result: dict[str, Any]) -> float | None:
    """How many times as fast as the fastest of the others; None where none of them ran."""
    ratios: Iterable[float | None] = (ratio(result, name) for name in result["contenders"][1:])
    return min((x for x in ratios if x is not None), default=None)
