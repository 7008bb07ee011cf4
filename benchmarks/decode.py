"""`python -m benchmarks --suite decode`: attention over KV caches, as a share of what a device copy moves.

Keys and values come from memory: calls go round caches of more than the L2 together. The time of one
call is the difference of two programs of more and of fewer calls, so that what one launch of a program
costs counts for nobody. The copy negates fp32 numbers in the same run; it reads and writes.
"""

import dataclasses
import fnmatch
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa3 import kv_cache

from .check import WrongResult
from .timing import Call, device_time, environment, flusher, gpu_state

attend: Any = kv_cache.dot_product_attention  # whose arguments are given in tuples here

ROTATED_BYTES = 256 * 2**20  # several times Hopper's L2
COPIED = 2**29  # fp32 numbers
MOST_CALLS = 24  # of a program
TOLERANCE = 2.0**-7  # of a result, of unit normals


@dataclasses.dataclass(frozen=True)
class DecodePoint:
    batch: int
    length: int  # the new rows included
    rows: int = 1  # of each sequence
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    page: int | None = 64  # None: contiguous
    window: int | None = None  # keys that a row sees
    bar: float | None = None  # the least share of the copy

    @property
    def name(self) -> str:
        pages = "contiguous" if self.page is None else f"pages{self.page}"
        window = "" if self.window is None else f"-w{self.window}"
        heads = "/".join(map(str, self.heads))
        return f"{self.batch}x{self.length}-t{self.rows}-{heads}xd{self.head_dim}-{pages}{window}"

    @property
    def seen(self) -> int:
        return self.length if self.window is None else min(self.window, self.length)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values that are read."""
        return 4 * self.batch * self.seen * self.heads[1] * self.head_dim

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * self.rows * self.seen * self.heads[0] * self.head_dim


POINTS = [
    DecodePoint(1, 4096, bar=0.40),
    DecodePoint(1, 32768, bar=0.85),
    DecodePoint(8, 4096, bar=0.86),
    DecodePoint(8, 32768, bar=1.01),
    DecodePoint(64, 4096, bar=1.02),
    DecodePoint(64, 32768, bar=1.02),
    DecodePoint(8, 4096, page=16),
    DecodePoint(8, 4096, page=None),
    *(DecodePoint(8, 32768, rows) for rows in (2, 8, 16)),
    DecodePoint(1, 32768, 512, (8, 1)),
    DecodePoint(64, 32768, heads=(32, 2), head_dim=256, bar=0.85),
    DecodePoint(128, 4096, heads=(64, 8), head_dim=64, window=128),
]


def points(patterns: Iterable[str] = ("*",)) -> list[DecodePoint]:
    return [p for p in POINTS if any(fnmatch.fnmatchcase(p.name, x) for x in patterns)]


class Inputs:
    def __init__(self, point: DecodePoint, calls: int):
        p = point
        size = p.page or p.length
        total = p.batch * -(-p.length // size)
        shape = total, size, p.heads[1], p.head_dim
        own = 4 * int(np.prod(shape))
        self.count = max(1, min(calls, -(-ROTATED_BYTES // own)))
        keys = jax.random.split(jax.random.key(0), 3)
        key, value = (jax.random.normal(k, shape, jnp.bfloat16) for k in keys[:2])
        others = [(jnp.copy(key), jnp.copy(value)) for _ in range(self.count - 1)]
        self.caches = [(key, value), *others]
        # One for each call: of equal calls XLA makes one.
        query = jax.random.normal(keys[2], (p.batch, p.rows, p.heads[0], p.head_dim), jnp.bfloat16)
        self.queries = [query * (1 + i / 64) for i in range(calls)]
        # Windows are read at other places each time, for those of one call fit into the L2.
        steps = [0 if p.window is None else i % 16 * p.window for i in range(calls)]
        self.lengths = [jnp.full((p.batch,), p.length - step, jnp.int32) for step in steps]
        order = np.random.default_rng(0).permutation(total).reshape(p.batch, -1)
        self.table = None if p.page is None else jnp.asarray(order, jnp.int32)


def fa3(point: DecodePoint, inputs: Inputs, i: int, query: Any, caches: Any) -> jax.Array:
    window = None if point.window is None else (point.window - 1, 0)
    return attend(
        query,
        *caches,
        inputs.lengths[i],
        page_table=inputs.table,
        local_window_size=window,
        implementation="fa3",
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
    return name == "fa3" or (point.window is None and point.rows == 1 and point.head_dim <= 128)


def microseconds(point: DecodePoint, inputs: Inputs, name: str, rounds: int) -> float:
    """Of one call."""
    calls = len(inputs.queries)
    fewer = max(1, calls // 3)

    def program(count: int) -> Any:
        def run(queries: Any, caches: Any) -> Any:
            call = functools.partial(CONTENDERS[name], point, inputs)
            return [call(i, queries[i], caches[i % inputs.count]) for i in range(count)]

        compiled = jax.jit(run)
        jax.block_until_ready(compiled(inputs.queries, inputs.caches))
        return compiled

    programs = [program(count) for count in (fewer, calls)]
    taken: list[list[float]] = [[], []]
    for _ in range(rounds):
        for times, run in zip(taken, programs, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run(inputs.queries, inputs.caches))
            times.append(time.perf_counter() - start)
    short, long = map(min, taken)
    return (long - short) / (calls - fewer) * 1e6


def check(point: DecodePoint, inputs: Inputs) -> float:
    """The greatest error of the first sequence."""
    found = fa3(point, inputs, 0, inputs.queries[0], inputs.caches[0])[:1]
    caches = inputs.caches[0]
    if inputs.table is not None:
        caches = [x[inputs.table[0]].reshape(1, -1, *x.shape[2:]) for x in caches]
    wide = [x[:1].astype(jnp.float32) for x in (inputs.queries[0], *caches)]
    window = None if point.window is None else (point.window - 1, 0)
    with jax.default_matmul_precision("highest"):
        wanted = attend(
            *wide, inputs.lengths[0][:1], local_window_size=window, implementation="xla"
        )
    error = float(jnp.abs(found.astype(jnp.float32) - wanted).max())
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
    report["gpu"] = gpu_state(flusher())
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
