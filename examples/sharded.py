"""Attention over several devices: three ways to split it, and what each device computes.

    python examples/sharded.py

runs on all GPUs of this machine, or on 8 virtual CPU devices. Batch and heads are split over a mesh
("data", "model"), forward and gradients; each way is compared with one device that computes all of
it, and its compiled program must not exchange anything. Over several processes, each with its own
devices, start one of these per process (on a cluster that JAX knows, such as Slurm's, --cluster
stands for the three numbers):

    python examples/sharded.py --coordinator HOST:PORT --processes 2 --process 0
"""

import argparse
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3

BATCH, LENGTH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 128, 8, 4, 64
CPU_DEVICES = 8
SPEC = P("data", None, "model", None)  # of query, key, value: [B, T, heads, head dim]
COLLECTIVES = r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("

attention = partial(jax_fa3.dot_product_attention, is_causal=True)


def start() -> None:
    """Joins the processes, if there are several, before JAX looks for devices."""
    parser = argparse.ArgumentParser(description="Attention over several devices")
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--cluster", action="store_true", help="the scheduler knows all of these")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES // args.processes)
    if args.cluster:
        jax.distributed.initialize()
    elif args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)


def make_mesh(kind: AxisType) -> Mesh:
    """All devices, heads over up to as many as there are key/value heads."""
    devices = jax.device_count()
    model = next(n for n in (4, 2, 1) if devices % n == 0 and n < max(devices, 2))
    return jax.make_mesh((devices // model, model), ("data", "model"), axis_types=(kind, kind))


def make_inputs() -> list[np.ndarray]:
    """query, key, value and the gradient of the output, the same in every process."""
    rng = np.random.default_rng(0)
    heads = NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS
    shapes = [(BATCH, LENGTH, n, HEAD_DIM) for n in heads]
    return [rng.standard_normal(shape, np.float32).astype(jnp.bfloat16) for shape in shapes]


def with_gradients(call: Any) -> Any:
    def function(query, key, value, cotangent):
        out, pullback = jax.vjp(call, query, key, value)
        return out, *pullback(cotangent)

    return function


def error(found: jax.Array, expected: np.ndarray) -> float:
    """Over the parts that this process has, as a share of the largest number."""
    scale = np.max(np.abs(expected))
    parts = ((np.asarray(s.data, np.float32), expected[s.index]) for s in found.addressable_shards)
    return max(float(np.max(np.abs(x - y)) / scale) for x, y in parts)


def show(way: str, call: Any, arrays: list[jax.Array], expected: list[np.ndarray]) -> None:
    """Compiles, runs, compares."""
    compiled = jax.jit(with_gradients(call)).lower(*arrays).compile()
    results = compiled(*arrays)
    exchanged = sorted(set(re.findall(COLLECTIVES, compiled.as_text() or "")))
    errors = [error(x, y) for x, y in zip(results, expected, strict=True)]
    local = results[0].addressable_shards[0].data.shape
    print(f"{way:<10} each device computes {local} of {results[0].shape}; ", end="")
    print(f"exchanged: {', '.join(exchanged) or 'nothing'}; max error {max(errors):.1e}")
    if exchanged:
        raise SystemExit(f"{way}: this should need no communication")
    if not max(errors) <= 4 * float(jnp.finfo(jnp.bfloat16).eps):  # a NaN fails too
        raise SystemExit(f"{way}: the result differs from that of one device")


def main() -> None:
    start()
    inputs = make_inputs()
    alone = jax.jit(with_gradients(attention))(*(jax.device_put(x) for x in inputs))
    expected = [np.asarray(x, np.float32) for x in alone]

    automatic, explicit = make_mesh(AxisType.Auto), make_mesh(AxisType.Explicit)
    kind = jax.devices()[0].device_kind
    print(f"devices    {jax.device_count()} x {kind}, {jax.process_count()} process(es)")
    print(f"mesh       {dict(automatic.shape)}")
    reason = jax_fa3.is_supported(*inputs[:3], is_causal=True)
    print("ran        " + ("the Hopper kernels" if reason is None else f"XLA, because {reason}"))

    def split(mesh: Mesh) -> list[jax.Array]:
        return [jax.device_put(x, NamedSharding(mesh, SPEC)) for x in inputs]

    # 1. Automatic axes: XLA sees how the inputs are split, and the library tells it what that means.
    show("automatic", attention, split(automatic), expected)

    # The same, but said in the call: such a program also exports and hits the compilation cache.
    told = partial(attention, sharding=NamedSharding(automatic, SPEC))
    show("sharding=", told, split(automatic), expected)

    # 2. Explicit axes: the arrays' types say how they are split, and so does the result's.
    show("explicit", attention, split(explicit), expected)

    # 3. Manual axes: inside shard_map every array is one device's part.
    specs = {"in_specs": (SPEC, SPEC, SPEC), "out_specs": SPEC}
    manual = jax.shard_map(attention, mesh=automatic, **specs)
    show("shard_map", manual, split(automatic), expected)


if __name__ == "__main__":
    main()
