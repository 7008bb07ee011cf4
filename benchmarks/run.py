"""Measures one point: everybody prepared and checked first, then timed in turn."""

import dataclasses
import importlib
import statistics
from collections.abc import Callable
from typing import Any

from .contenders import PASSES, Refused, problem
from .points import Point
from .timing import Call, Timing, device_time, in_rounds, ratio

BACK_TO_BACK = 10  # calls, for the second column


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return (
        text[0][:300] if isinstance(error, Refused) else f"{type(error).__name__}: {text[0][:300]}"
    )


def prepare(point: Point) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """The calls of those who take the point, compiled, run once and right; and for each contender
    what is known so far: its error as a share of what is allowed, or why it refuses.

    Raises WrongResult where this library is wrong; a rival that is wrong, or fails in any other
    way, is only left out.
    """
    current = PASSES[point.pass_name]
    inputs = current.inputs(point)
    calls, records = {}, {}
    for name in dict.fromkeys((*point.contenders, point.baseline)):
        solved = problem(point, name)
        try:
            call = current.call(solved, name, inputs)
            records[name] = {"error_share": current.check(solved, inputs, call())}
            calls[name] = call
        except (Refused, NotImplementedError) as error:
            records[name] = {"refused": _reason(error)}
        except Exception as error:
            if name.startswith("fa3"):
                raise
            records[name] = {"refused": _reason(error)}
    return calls, records


def summarise(
    point: Point,
    times: dict[str, list[float]],
    back_to_back: dict[str, Timing],
    records: dict[str, dict[str, Any]],
    tile: tuple[int, int] | None,
) -> dict[str, Any]:
    """The JSON record of one point."""
    for name, ms in times.items():
        record = records[name]
        theirs = problem(point, name).flops()
        median = statistics.median(ms)
        record["ms"] = median
        record["tflops"] = theirs / median / 1e9
        record["gb_per_s"] = point.moved_bytes() / median / 1e6
        record["ratio"] = ratio(times[point.baseline], ms) if point.baseline in times else None
        record["back_to_back_ms"] = back_to_back[name].ms
        record["back_to_back_tflops"] = theirs / back_to_back[name].ms / 1e9
        record["kernels"] = list(back_to_back[name].kernels)
        record["times_ms"] = ms
    # Where the baseline computes every block, this is the share of its time that is to be expected.
    share = point.visible_share(*tile) if tile and point.baseline == "fa3 full" else None
    return {
        **dataclasses.asdict(point),
        "mask": point.mask,
        "flops": point.flops(),
        "moved_bytes": point.moved_bytes(),
        "visible_share": share,
        "results": records,
    }


def _tile(point: Point) -> tuple[int, int] | None:
    """The kernel's own block sizes."""
    if point.baseline != "fa3 full":
        return None
    return importlib.import_module("jax_fa3._C").tile(point.head_dim, point.head_dim_v, False)


def measure(
    point: Point,
    rounds: int,
    between: Callable[[], None],
    timer: Callable[..., Timing] = device_time,
) -> dict[str, Any]:
    """Prepares, times and summarises one point. Raises WrongResult where this library is wrong."""
    calls, records = prepare(point)
    if not calls:
        return summarise(point, {}, {}, records, None)
    times = in_rounds(calls, rounds, between, timer)
    back_to_back = {name: timer(call, BACK_TO_BACK) for name, call in calls.items()}
    return summarise(point, times, back_to_back, records, _tile(point))
