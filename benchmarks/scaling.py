"""`python -m benchmarks --suite scaling`: the same work on each of 1, 2 and 4 GPUs.

Ideal is the slowest of these GPUs alone. CUPTI does not say on which GPU a kernel ran, so a call over
several counts, of each kernel, the slowest of them all: never less than the slowest GPU's time.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3

from .timing import Call, environment, flusher, kernel_records

COUNTS = (2, 4)
SHAPE = (2, 8192, 16, 128)  # [B, T, N, H] of each GPU, causal
SPECS = {"batch": P("gpus"), "heads": P(None, None, "gpus")}

_attention: Any = partial(jax_fa3.dot_product_attention, is_causal=True)


def _with_gradients(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
    out, pullback = jax.vjp(_attention, query, key, value)
    return out, pullback(cotangent)


PASSES = {
    "forward": lambda query, key, value, _: _attention(query, key, value),
    "forward + backward": _with_gradients,
}


def slowest(records: Sequence[tuple[str, float]], devices: int) -> float:
    """Milliseconds of one call from all GPUs' kernel records (name, ms)."""
    times: dict[str, list[float]] = {}
    for name, ms in records:
        times.setdefault(name, []).append(ms)
    # A kernel that runs k times a call on each GPU: its k slowest runs.
    counts = {name: math.ceil(len(ms) / devices) for name, ms in times.items()}
    return sum(sum(sorted(ms)[-counts[name] :]) for name, ms in times.items())


def _inputs(shape: Sequence[int], where: Any) -> tuple[jax.Array, ...]:
    make = jax.jit(partial(jax.random.normal, shape=shape, dtype=jnp.bfloat16), out_shardings=where)
    return tuple(make(key) for key in jax.random.split(jax.random.key(0), 4))


def _calls(
    devices: Sequence[Any], shape: tuple[int, ...], function: Any
) -> dict[str, tuple[Call, int]]:
    """Each GPU alone, and all of them: the call, compiled and run once, and its number of GPUs."""
    calls = {}
    for i, device in enumerate(devices):
        inputs = _inputs(shape, jax.sharding.SingleDeviceSharding(device))
        calls[f"GPU {i}"] = Call(jax.jit(function), inputs), 1
    mesh = Mesh(np.array(devices), ("gpus",), axis_types=(AxisType.Auto,))
    for axis, spec in SPECS.items():
        whole = list(shape)
        whole[0 if axis == "batch" else 2] *= len(devices)
        inputs = _inputs(whole, NamedSharding(mesh, spec))
        calls[axis] = Call(jax.jit(function), inputs), len(devices)
    for call, _ in calls.values():
        call()
    return calls


def measure(
    devices: Sequence[Any],
    rounds: int,
    between: Callable[[], None],
    counts: Sequence[int] = COUNTS,
    shape: tuple[int, ...] = SHAPE,
    records: Callable[[Call], Sequence[tuple[str, float]]] = kernel_records,
) -> Iterator[dict[str, Any]]:
    """One record per number of GPUs, pass and axis; as many GPUs as there are."""
    for count in (n for n in counts if n <= len(devices)):
        for name, function in PASSES.items():
            calls = _calls(devices[:count], shape, function)
            times: dict[str, list[float]] = {call: [] for call in calls}
            for _ in range(rounds):
                for label, (call, gpus) in calls.items():
                    between()
                    times[label].append(slowest(records(call), gpus))
            alone = [max(ms) for ms in zip(*(times[f"GPU {i}"] for i in range(count)), strict=True)]
            for axis in SPECS:
                ratios = [a / b for a, b in zip(alone, times[axis], strict=True)]
                ms = statistics.median(times[axis])
                result = {"gpus": count, "pass": name, "split": axis, "ms": ms, "times_ms": times}
                yield result | {"of_ideal": statistics.median(ratios)}


def main(devices: Sequence[Any], rounds: int, file: Path | None) -> dict[str, Any]:
    """Measures, prints and writes the JSON after each result."""
    results: list[dict[str, Any]] = []
    report = {"environment": environment(), "rounds": rounds, "scaling": results}
    for result in measure(devices, rounds, flusher()):
        results.append(result)
        cells = result["gpus"], result["pass"], result["split"], f"{result['of_ideal']:.3f}"
        print(*cells, flush=True)
        if file:
            file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"\n{markdown(results)}", end="")
    return report


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table."""
    batch, length, heads, dim = SHAPE
    lines = [
        f"bf16, causal, {batch} x {length} tokens, {heads} heads of {dim} on each GPU:",
        "",
        "| GPUs | pass | split | time | of ideal |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        cells = r["gpus"], r["pass"], r["split"], f"{r['ms']:.3f} ms", f"{r['of_ideal']:.3f}"
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
