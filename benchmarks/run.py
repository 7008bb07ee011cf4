"""Measures points: of each, everybody prepared and checked first, then timed in turn."""

import dataclasses
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import report as reports
from .contenders import PASSES, problem
from .points import Point
from .rivals import Refused
from .timing import (
    Call,
    Timing,
    device_time,
    environment,
    flusher,
    gpu_state,
    in_rounds,
    ratio,
)

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


def measure_all(
    points: list[Point],
    rounds: int,
    file: Path | None = None,
    resume: bool = False,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """The JSON report of all points, in the file after each one. With `resume`, those that the file
    has are kept, not measured again; after `minutes` no further point begins.

    Raises ValueError where the file's rounds are others, WrongResult where this library is wrong.
    """
    started = time.monotonic()
    earlier: list[dict[str, Any]] = []
    if resume and file and file.exists():
        earlier = [json.loads(file.read_text(encoding="utf-8"))]
        if earlier[0]["rounds"] != rounds:
            raise ValueError(f"{file}: got {earlier[0]['rounds']} rounds, wanted {rounds}")
        done = {result["name"] for result in earlier[0]["points"]}
        points = [point for point in points if point.name not in done]
        if not points:
            return earlier[0]
    between = flusher()
    names = list(dict.fromkeys(name for p in points for name in (*p.contenders, p.baseline)))
    run: dict[str, Any] = {
        "environment": environment(),
        "rounds": rounds,
        "begin": gpu_state(between),
        "points": [],
    }

    def save() -> dict[str, Any]:
        run["wall_s"] = time.monotonic() - started
        report = reports.joined([*earlier, run])
        if file:
            file.write_text(json.dumps(report, indent=1), encoding="utf-8")
        return report

    print(reports.header(names), flush=True)
    for i, point in enumerate(points):
        if time.monotonic() - started > 60 * minutes:
            print(f"{i} of {len(points)} points in {minutes} minutes: --resume goes on", flush=True)
            break
        result = measure(point, rounds, between)
        print("\n".join([reports.line(result, names), *reports.refusals(result)]), flush=True)
        run["points"].append(result)
        save()
    run["end"] = gpu_state(between)
    report = save()
    print(f"{run['wall_s']:.0f} s", flush=True)
    return report
