"""`python -m benchmarks --suite decode`: attention over KV caches, as a share of what a device copy moves.

Keys and values come from memory: calls go round caches of more than the L2 together. Time is the GPU's,
from the first kernel of a program of many calls, which XLA makes a CUDA graph of, to the end of its last
one, over the calls: between them is what they cost each other, but not what the host takes to launch the
program. The copy negates fp32 numbers in the same run; it reads and writes.
"""

import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa3 import kv_cache

from .check import WrongResult
from .decode_points import DecodePoint
from .timing import Call, device_spans, device_time, environment, flusher, gpu_state

attend: Any = kv_cache.dot_product_attention  # whose arguments are given in tuples here

ROTATED_BYTES = 256 * 2**20  # several times Hopper's L2
COPIED = 2**29  # fp32 numbers
MOST_CALLS = 24  # of a program
TOLERANCE = 2.0**-7  # of a result, of unit normals


class Inputs:
    def __init__(self, point: DecodePoint, calls: int):
        p = point
        size = p.page or p.length
        lengths = np.concatenate([[length] * count for count, length, _ in p.kinds])
        owned = -(-lengths // size)
        total = int(owned.sum())
        shape = total, size, p.heads[1], p.head_dim
        own = (2 if p.e4m3 else 4) * int(np.prod(shape))
        self.count = max(1, min(calls, -(-ROTATED_BYTES // own)))
        keys = jax.random.split(jax.random.key(0), 3)
        dtype = jnp.float8_e4m3fn if p.e4m3 else jnp.bfloat16
        key, value = (jax.random.normal(k, shape, jnp.bfloat16).astype(dtype) for k in keys[:2])
        others = [(jnp.copy(key), jnp.copy(value)) for _ in range(self.count - 1)]
        self.caches = [(key, value), *others]
        # One for each call: of equal calls XLA makes one.
        counts = np.concatenate([[rows] * count for count, _, rows in p.kinds])
        rows = (int(counts.sum()),) if p.others else (p.batch, p.rows)
        query = jax.random.normal(keys[2], (*rows, p.heads[0], p.head_dim), jnp.bfloat16)
        starts = np.concatenate([[0], np.cumsum(counts)])
        self.starts = jnp.asarray(starts, jnp.int32) if p.others else None
        self.options: dict[str, Any] = {}
        if p.e4m3:
            scale = jnp.full(p.heads[1], 0.5, jnp.float32)
            self.options = {"key_scale": scale, "value_scale": scale}
        if p.sinks:
            self.options["sinks"] = jnp.zeros(p.heads[0], jnp.float32)
        self.queries = [query * (1 + i / 64) for i in range(calls)]
        # Windows are read at other places each time, for those of one call fit into the L2.
        steps = [0 if p.window is None else i % 16 * p.window for i in range(calls)]
        self.lengths = [jnp.asarray(lengths - step, jnp.int32) for step in steps]
        order, last = np.random.default_rng(0).permutation(total), np.cumsum(owned)
        table = np.full((len(lengths), owned.max()), -1)
        for b, (stop, count) in enumerate(zip(last, owned, strict=True)):
            table[b, :count] = order[stop - count : stop]
        self.table = None if p.page is None else jnp.asarray(table, jnp.int32)


def fa3(point: DecodePoint, inputs: Inputs, i: int, query: Any, caches: Any) -> jax.Array:
    window = None if point.window is None else (point.window - 1, 0)
    return attend(
        query,
        *caches,
        inputs.lengths[i],
        page_table=inputs.table,
        query_starts=inputs.starts,
        local_window_size=window,
        implementation="fa3",
        **inputs.options,
    )


def cudnn(point: DecodePoint, inputs: Inputs, i: int, query: Any, caches: Any) -> jax.Array:
    """On a contiguous cache of as many numbers."""
    shape = point.batch, -1, *caches[0].shape[2:]
    rows = (x.reshape(shape) for x in caches)
    return jax.nn.dot_product_attention(
        query, *rows, key_value_seq_lengths=inputs.lengths[i], implementation="cudnn"
    )


CONTENDERS: dict[str, Callable[..., jax.Array]] = {"fa3": fa3, "cudnn": cudnn}


def takes(point: DecodePoint, name: str) -> bool:
    plain = point.window is None and point.rows == 1 and point.head_dim <= 128
    whole = point.page is None or point.length % point.page == 0
    return name == "fa3" or (plain and whole and not point.e4m3 and point.others is None)


def microseconds(point: DecodePoint, inputs: Inputs, name: str, rounds: int) -> float:
    """Of one call."""
    calls = len(inputs.queries)

    def run(queries: Any, caches: Any) -> Any:
        call = functools.partial(CONTENDERS[name], point, inputs)
        return [call(i, queries[i], caches[i % inputs.count]) for i in range(calls)]

    program = Call(jax.jit(run), (inputs.queries, inputs.caches))
    program()
    return min(device_spans(program, rounds)) / calls * 1e3


def check(point: DecodePoint, inputs: Inputs) -> float:
    """The greatest error of the first sequence."""
    found = fa3(point, inputs, 0, inputs.queries[0], inputs.caches[0])
    query = inputs.queries[0]
    if point.others:
        found, query = (x[: point.rows][None] for x in (found, query))
    caches = inputs.caches[0]
    if inputs.table is not None:
        caches = [x[inputs.table[0]].reshape(1, -1, *x.shape[2:]) for x in caches]
    wide = [x[:1].astype(jnp.float32) for x in (query, *caches)]
    window = None if point.window is None else (point.window - 1, 0)
    options = {"local_window_size": window, **inputs.options, "implementation": "xla"}
    with jax.default_matmul_precision("highest"):
        wanted = attend(*wide, inputs.lengths[0][:1], **options)
    error = float(jnp.abs(found[:1].astype(jnp.float32) - wanted).max())
    if not error <= TOLERANCE:
        raise WrongResult(f"{point.name}: off by {error:.3g}, more than {TOLERANCE}")
    return error


def copied_bytes_per_second(rounds: int) -> float:
    call = Call(jax.jit(jnp.negative), (jnp.ones(COPIED, jnp.float32),))
    call()
    return 8 * COPIED / statistics.median(device_time(call).ms for _ in range(rounds)) * 1e3


def measure(point: DecodePoint, rounds: int, copy: float) -> dict[str, Any]:
    few = point.cache_bytes > 2**30
    inputs = Inputs(point, 3 if few else MOST_CALLS)
    row: dict[str, Any] = {"name": point.name, "bar": point.bar, "error": check(point, inputs)}
    for name in CONTENDERS:
        if not takes(point, name):
            continue
        taken = microseconds(point, inputs, name, rounds)
        share = point.cache_bytes / taken * 1e6 / copy
        row[name] = {"us": taken, "of_copy": share, "tflops": point.flops / taken / 1e6}
    return row


def main(chosen: list[DecodePoint], rounds: int, file: Path | None) -> dict[str, Any]:
    report: dict[str, Any] = {"suite": "decode", "environment": environment(), "rounds": rounds}
    report["begin"] = gpu_state(flusher())
    report["copy"] = copied_bytes_per_second(5)
    report["points"] = []
    for point in chosen:
        report["points"].append(measure(point, rounds, report["copy"]))
        print(markdown({**report, "points": report["points"][-1:]}).splitlines()[-1], flush=True)
        if file is not None:
            file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def markdown(report: dict[str, Any]) -> str:
    lines = [f"A copy moves {report['copy'] / 1e12:.2f} TB/s.", ""]
    lines += [
        "| | us | of the copy | TFLOP/s | cuDNN: us | of the copy | bar |",
        "|---|" + "---|" * 6,
    ]
    for row in report["points"]:
        own, theirs = row["fa3"], row.get("cudnn")
        other = f"{theirs['us']:.1f} | {theirs['of_copy']:.2f}" if theirs else "– | –"
        bar = "–" if row["bar"] is None else f"{row['bar']:.2f}"
        numbers = f"{own['us']:.1f} | {own['of_copy']:.2f} | {own['tflops']:.0f}"
        lines.append(f"| {row['name']} | {numbers} | {other} | {bar} |")
    return "\n".join(lines) + "\n"
