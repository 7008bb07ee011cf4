"""`python -m benchmarks --suite ring`: one long sequence over several GPUs, by every strategy of
jax_fa3.context_parallel, against one GPU with the same work.

Ideal is the time of the slowest of these GPUs alone, each doing the whole work at the same time as
the others, over their number. Wall time of a few calls in a row, for kernel records of several GPUs
do not add up to it; in rounds, one contender after the other. Of long sequences there are fewer
rounds, and of the longest, which one GPU alone takes many seconds for, that one's first run is what
counts.
"""

import dataclasses
import fnmatch
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .check import WrongResult, check_forward
from .ring_calls import ALONE, STRATEGIES, TWO_LEVEL, Layout, RingPoint, compiled, inputs
from .ring_tables import markdown
from .timing import Call, Timing, environment, flusher, gpu_state, in_rounds, ratio

GPUS = (2, 4, 8)
LENGTHS = (2**15, 2**17, 2**19, 2**20)
CALLS = 3  # in a row
BUDGET_MS = 20e3  # of a point's rounds; and one round always
LONG_MS = 1e3  # a call that takes longer is by itself, and of one GPU alone not run again
CHECKED_ROWS = 2048
# Of a row of out and of a whole gradient: how far two right results in bf16 may be apart, as a share
# of the norm, with room for luck.
TOLERANCE = 0.02
LINK_BYTES = 2**28


def points(patterns: Iterable[str] = ("*",)) -> list[RingPoint]:
    made = [RingPoint(s, p) for s in LENGTHS for p in ("fwd", "fwd+bwd")]
    return [p for p in made if any(fnmatch.fnmatch(p.name, pattern) for pattern in patterns)]


def layouts(gpus: int, wanted: Sequence[str] = STRATEGIES) -> list[Layout]:
    """Two levels take two GPUs each."""
    names = [s for s in STRATEGIES if s in wanted and (s != TWO_LEVEL or gpus >= 4)]
    return [Layout(name, gpus) for name in (ALONE, *names)]


def link_rate() -> float:
    """GB/s that each GPU sends to the next, and as many arrive, all at the same time: of NVLink, as a
    ring uses it."""
    devices = np.array(jax.devices())
    sharding = NamedSharding(Mesh(devices, ("gpus",)), P("gpus"))
    around = [(i, (i + 1) % len(devices)) for i in range(len(devices))]
    x = jax.device_put(np.zeros((len(devices), LINK_BYTES), np.int8), sharding)
    send = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.ppermute(x, "gpus", around),
            mesh=sharding.mesh,
            in_specs=P("gpus"),
            out_specs=P("gpus"),
        )
    )
    call = Call(send, (x,))
    call()
    times = [_wall_time(call, 10).ms for _ in range(5)]
    return LINK_BYTES / statistics.median(times) / 1e6


def _check(
    p: RingPoint,
    results: Mapping[Layout, Sequence[Any]],
    arrays: tuple[jax.Array, ...],
    alone: dict[int, list[np.ndarray]],
) -> None:
    """Out of a GPU alone against fp32 maths, everybody else against that. Keeps in `alone` what the
    next are compared with."""
    where = np.unique(np.linspace(0, p.seqlen - 1, CHECKED_ROWS).astype(int))
    for layout, (out, *grads) in results.items():
        found = [layout.rows(x, where) for x in (out, *grads)]
        if layout.strategy == ALONE:
            if not alone:  # of long sequences fewer rows, each of which is much work for the host
                rows = 64 if p.seqlen <= 2**17 else 8
                one = out.addressable_shards[0].data
                check_forward(p.problem, arrays[:3], jnp.asarray(one), rows=rows)
            alone.setdefault(0, found)
        for i, (x, y) in enumerate(zip(found, alone[0], strict=True)):
            axes = (1, 2) if i == 0 else None
            error = np.linalg.norm((x - y), axis=axes) / np.linalg.norm(y, axis=axes)
            if not np.max(error) <= TOLERANCE:
                what = ("out", "gradient of query", "gradient of key", "gradient of value")[i]
                by = f"{layout.strategy} {layout.devices}"
                raise WrongResult(f"{p.name}, {by}: {what} is off by {np.max(error):.1%}")


def _wall_time(call: Call, calls: int = CALLS) -> Timing:
    start = time.perf_counter()
    jax.block_until_ready([call.fn(*call.args) for _ in range(calls)])
    return Timing((time.perf_counter() - start) * 1e3 / calls, ())


def _timed(
    calls: Mapping[str, Call], first: Mapping[str, float], rounds: int, between: Callable[[], None]
) -> dict[str, list[float]]:
    """Milliseconds in rounds; those of a long call alone, which has nothing to get ready, are `first`."""
    done = {key for key, ms in first.items() if key.startswith(ALONE) and ms > LONG_MS}
    left = {key: call for key, call in calls.items() if key not in done}
    row = 1 if max(first[key] for key in left) > LONG_MS else CALLS
    rounds = max(1, min(rounds, int(BUDGET_MS / (row * sum(first[key] for key in left)))))
    times = in_rounds(left, rounds, between, lambda call: _wall_time(call, row))
    return {key: times.get(key, [first[key]] * rounds) for key in calls}


def measure(
    p: RingPoint, rounds: int, between: Callable[[], None], wanted: Sequence[str] = STRATEGIES
) -> dict[str, Any]:
    """Everybody run once and checked, then timed in turn. Raises WrongResult."""
    arrays = inputs(p.problem)
    records: dict[str, dict[str, Any]] = {}
    alone: dict[int, list[np.ndarray]] = {}
    for gpus in (n for n in GPUS if n <= jax.device_count()):
        calls, first, placed = {}, {}, {}
        for layout in layouts(gpus, wanted):
            key, place = f"{layout.strategy} {gpus}", (layout.sharding, layout.zigzag)
            if place not in placed:
                placed[place] = tuple(map(layout.put, arrays))
            calls[key], memory = compiled(p, layout, placed[place])
            records[key] = {"temporary_bytes": memory}
            start = time.perf_counter()
            results = calls[key]()
            first[key] = (time.perf_counter() - start) * 1e3
            _check(p, {layout: results}, arrays, alone)
            del results
        times = _timed(calls, first, rounds, between)
        for key, ms in times.items():
            made, faster = 1 if key.startswith(ALONE) else gpus, ratio(times[f"{ALONE} {gpus}"], ms)
            median = statistics.median(ms)
            records[key] |= {
                "ms": median,
                "tflops_per_gpu": p.flops() / made / median / 1e9,
                "of_ideal": faster / made,
                "times_ms": ms,
            }
    return {**dataclasses.asdict(p), "name": p.name, "flops": p.flops(), "results": records}


def main(
    selected: list[RingPoint], rounds: int, file: Path | None, wanted: Sequence[str] = STRATEGIES
) -> dict[str, Any]:
    """Measures, prints and writes the JSON after each point."""
    between = flusher()
    report: dict[str, Any] = {"suite": "ring", "environment": environment(), "rounds": rounds}
    report |= {"begin": gpu_state(between), "link_gb_per_s": link_rate(), "points": []}
    for p in selected:
        result = measure(p, rounds, between, wanted)
        print(markdown({"points": [result]}), flush=True)
        report["points"].append(result)
        if file:
            file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report
