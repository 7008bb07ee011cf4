"""`python -m benchmarks --suite ring`: one long sequence over several GPUs, by every strategy of
jax_fa3.context_parallel, against one GPU with the same work.

Ideal is the time of the slowest of these GPUs alone, each doing the whole work at the same time as
the others, over their number. Wall time of a few calls in a row, for kernel records of several GPUs
do not add up to it; in rounds, one contender after the other.
"""

import dataclasses
import fnmatch
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3
from jax_fa3 import context_parallel

from .check import WrongResult, check_forward
from .points import Point, point
from .timing import Call, Timing, environment, flusher, gpu_state, in_rounds, ratio

ALONE = "alone"
STRATEGIES = ("ring", "all_gather", "all_to_all")
GPUS = (2, 4)
CALLS = 3  # in a row
# Of a gradient's norm: how far two right results in bf16 may be apart, with room for luck.
GRADIENT_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class RingPoint:
    """Causal, 32 query and 8 key/value heads of 128 unless said otherwise."""

    seqlen: int
    pass_name: Literal["fwd", "fwd+bwd"]
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    implementation: Literal["fa3", "xla"] = "fa3"

    @property
    def name(self) -> str:
        return f"{self.pass_name}-d{self.head_dim}-causal-s{self.seqlen}"

    @property
    def problem(self) -> Point:
        """The forward of it."""
        fields: Any = {"heads": self.heads, "batch": 1, "is_causal": True}
        return point("ring", self.head_dim, self.seqlen, **fields)

    def flops(self) -> float:
        """The backward counts 2.5 times the forward, as in the FlashAttention papers."""
        return self.problem.flops() * (1 if self.pass_name == "fwd" else 3.5)


def points(patterns: Iterable[str] = ("*",)) -> list[RingPoint]:
    made = [RingPoint(s, p) for s in (2**15, 2**17) for p in ("fwd", "fwd+bwd")]
    return [p for p in made if any(fnmatch.fnmatch(p.name, pattern) for pattern in patterns)]


def _inputs(problem: Point) -> tuple[jax.Array, ...]:
    """query, key, value and the cotangent of out, on the first GPU, in natural order."""
    heads = problem.num_heads_q, problem.num_heads_k, problem.num_heads_k, problem.num_heads_q
    return tuple(
        jax.random.normal(jax.random.key(i), (1, problem.seqlen, n, problem.head_dim), jnp.bfloat16)
        for i, n in enumerate(heads)
    )


def _call(p: RingPoint, strategy: str, devices: int, inputs: tuple[jax.Array, ...]) -> Call:
    """The call whose results are out, or out and three gradients; in the strategy's order. Alone:
    a list of such results, of one device each."""
    options: Any = {"is_causal": True, "implementation": p.implementation}
    attend: Callable[..., Any] = jax_fa3.dot_product_attention
    on = jax.devices()[:devices]
    if strategy != ALONE:
        mesh = Mesh(np.array(on), ("sequence",))
        sharding = NamedSharding(mesh, P(None, "sequence"))
        zigzag = _is_zigzag(strategy)
        options |= {"axis_name": "sequence", "strategy": strategy}
        options |= {"zigzag": zigzag, "sharding": sharding}
        attend = context_parallel.dot_product_attention
        if zigzag:
            inputs = tuple(context_parallel.to_zigzag(x, devices) for x in inputs)
        inputs = jax.device_put(inputs, sharding)

    def run(query, key, value, dout):
        def attention(*qkv):
            return attend(*qkv, **options)

        if p.pass_name == "fwd":
            return (attention(query, key, value),)
        out, pullback = jax.vjp(attention, query, key, value)
        return (out, *pullback(dout))

    if strategy == ALONE:
        attend_alone = jax.jit(run)
        copies = tuple(jax.device_put(inputs, device) for device in on)
        return Call(lambda *copies: [attend_alone(*x) for x in copies], copies)
    return Call(jax.jit(run), inputs)


def _is_zigzag(strategy: str) -> bool:
    return strategy in ("ring", "all_gather")


def _check(p: RingPoint, results: Mapping[str, Sequence[Any]], inputs: Any) -> None:
    """Forward of all against fp32 maths; gradients against those of a GPU alone."""
    alone = results[next(iter(results))]
    for name, (out, *grads) in results.items():
        check_forward(p.problem, inputs[:3], jnp.asarray(out))
        for i, (found, one) in enumerate(zip(grads, alone[1:], strict=True)):
            x, y = (a.astype(np.float32) for a in (found, one))
            error = np.linalg.norm(x - y) / np.linalg.norm(y)
            if not error <= GRADIENT_TOLERANCE:
                what = ("query", "key", "value")[i]
                raise WrongResult(f"{p.name}, {name}: gradient of {what} is off by {error:.1%}")


def _wall_time(call: Call) -> Timing:
    start = time.perf_counter()
    jax.block_until_ready([call.fn(*call.args) for _ in range(CALLS)])
    return Timing((time.perf_counter() - start) * 1e3 / CALLS, ())


def measure(p: RingPoint, rounds: int, between: Callable[[], None]) -> dict[str, Any]:
    """Everybody run once and checked, then timed in turn. Raises WrongResult."""
    inputs = _inputs(p.problem)
    available = [n for n in GPUS if n <= jax.device_count()]
    calls, results, made = {}, {}, {}
    for name, devices in [(s, n) for n in available for s in (ALONE, *STRATEGIES)]:
        key = f"{name} {devices}"
        made[key] = 1 if name == ALONE else devices
        calls[key] = _call(p, name, devices, inputs)
        found = calls[key]()
        arrays = [np.asarray(x) for x in (found[0] if name == ALONE else found)]
        if _is_zigzag(name):
            arrays = [context_parallel.from_zigzag(x, devices) for x in arrays]
        results[key] = arrays
    _check(p, results, inputs)
    times = in_rounds(calls, rounds, between, _wall_time)
    records = {}
    for key, ms in times.items():
        median = statistics.median(ms)
        faster = ratio(times[f"{ALONE} {key.split()[1]}"], ms)
        records[key] = {
            "ms": median,
            "tflops_per_gpu": p.flops() / made[key] / median / 1e9,
            "of_ideal": faster / made[key],
            "times_ms": ms,
        }
    return {**dataclasses.asdict(p), "name": p.name, "flops": p.flops(), "results": records}


def markdown(report: dict[str, Any]) -> str:
    lines = ["| | GPUs | ms | TFLOP/s per GPU | of ideal |", "|---|---|---|---|---|"]
    for result in report["points"]:
        for key, record in result["results"].items():
            strategy, devices = key.split()
            cells = (
                f"{record['ms']:.2f} | {record['tflops_per_gpu']:.0f} | {record['of_ideal']:.3f}"
            )
            lines.append(f"| {result['name']}, {strategy} | {devices} | {cells} |")
    return "\n".join(lines) + "\n"


def grid(report: dict[str, Any]) -> str:
    """The page's table: one row per pass and strategy, one column per length and number of GPUs."""
    title = {"fwd": "forward", "fwd+bwd": "forward and backward"}
    rows: dict[str, dict[str, str]] = {}
    for result in report["points"]:
        for key, record in result["results"].items():
            strategy, devices = key.split()
            if strategy != ALONE:
                row = rows.setdefault(f'{title[result["pass_name"]]}, `"{strategy}"`', {})
                cell = f"{record['tflops_per_gpu']:.0f} ({record['of_ideal']:.2f})"
                row[f"{devices} GPUs, {result['seqlen'] // 1024}k"] = cell
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [" | ".join(["| TFLOP/s per GPU (of ideal)", *columns]) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        lines.append(" | ".join([f"| {name}", *(row.get(x, "–") for x in columns)]) + " |")
    return "\n".join(lines) + "\n"


def main(selected: list[RingPoint], rounds: int, file: Path | None) -> dict[str, Any]:
    """Measures, prints and writes the JSON after each point."""
    between = flusher()
    report: dict[str, Any] = {"suite": "ring", "environment": environment(), "rounds": rounds}
    report |= {"begin": gpu_state(between), "points": []}
    for p in selected:
        result = measure(p, rounds, between)
        print(markdown({"points": [result]}), flush=True)
        report["points"].append(result)
        if file:
            file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report
