"""The contenders of `--suite ring`: one long sequence by each strategy, and by each GPU alone."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3
from jax_fa3 import context_parallel

from .points import Point, point
from .timing import Call

ALONE = "alone"
# Heads over two neighbouring GPUs, the ring over as many pairs as there are.
TWO_LEVEL = "heads_and_ring"
STRATEGIES = ("ring", "all_gather", "all_to_all", TWO_LEVEL)
RANDOM_ROWS = 2**17  # made at a time: more would not be counted by 32 bits


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


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which GPUs a contender runs on, and where each row of the sequence is."""

    strategy: str
    devices: int

    @property
    def ring(self) -> int:
        """Devices along the axis of the sequence."""
        return self.devices // 2 if self.strategy == TWO_LEVEL else self.devices

    @property
    def zigzag(self) -> bool:
        return self.strategy not in (ALONE, "all_to_all")

    @property
    def sharding(self) -> NamedSharding:
        """Of [B, T, N, H]; alone, each GPU has one of B copies."""
        grid = np.reshape(jax.devices()[: self.devices], (self.ring, -1))
        spec = P("sequence") if self.strategy == ALONE else P(None, "sequence", "heads")
        return NamedSharding(Mesh(grid, ("sequence", "heads")), spec)

    def put(self, x: jax.Array) -> jax.Array:
        """A whole array in natural order."""
        if self.strategy == ALONE:
            devices = jax.devices()[: self.devices]
            copies = [jax.device_put(x, device) for device in devices]
            shape = self.devices, *x.shape[1:]
            return jax.make_array_from_single_device_arrays(shape, self.sharding, copies)
        return jax.device_put(
            context_parallel.to_zigzag(x, self.ring) if self.zigzag else x, self.sharding
        )

    def rows(self, x: jax.Array, wanted: np.ndarray) -> np.ndarray:
        """Those rows of the sequence, fp32 [R, N, H], of a result that lies as `put` does. Never is
        all of it in one place."""
        where = wanted
        if self.zigzag:
            order = np.asarray(context_parallel.zigzag_positions(x.shape[1], self.ring))
            where = np.argsort(order)[wanted]
        found = np.full((len(wanted), *x.shape[2:]), np.nan, np.float32)
        for shard in x.addressable_shards:
            rows, heads = shard.index[1:3]
            first, last, _ = rows.indices(x.shape[1])
            here = (where >= first) & (where < last)
            if here.any():
                found[here, heads] = shard.data[0, where[here] - first]
        return found


def inputs(problem: Point) -> tuple[jax.Array, ...]:
    """query, key, value and the cotangent of out, on the first GPU, in natural order."""
    heads = problem.num_heads_q, problem.num_heads_k, problem.num_heads_k, problem.num_heads_q
    size = min(problem.seqlen, RANDOM_ROWS)

    def make(key: jax.Array, n: int) -> jax.Array:
        shape = 1, size, n, problem.head_dim
        keys = jax.random.split(key, problem.seqlen // size)
        parts = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    return tuple(make(jax.random.key(i), n) for i, n in enumerate(heads))


def compiled(p: RingPoint, layout: Layout, arrays: tuple[jax.Array, ...]) -> tuple[Call, int]:
    """The call whose results are out, or out and three gradients, and the bytes that each GPU needs
    for it beside what goes in and comes out."""
    options: Any = {"is_causal": True, "implementation": p.implementation}
    attend: Callable[..., Any] = jax_fa3.dot_product_attention
    sharding = layout.sharding
    if layout.strategy == ALONE:
        options["sharding"] = sharding
    else:
        strategy = "ring" if layout.strategy == TWO_LEVEL else layout.strategy
        options |= {"axis_name": "sequence", "strategy": strategy}
        options |= {"zigzag": layout.zigzag, "sharding": sharding}
        attend = context_parallel.dot_product_attention

    def run(query, key, value, dout):
        def attention(*qkv):
            return attend(*qkv, **options)

        if p.pass_name == "fwd":
            return (attention(query, key, value),)
        out, pullback = jax.vjp(attention, query, key, value)
        return (out, *pullback(dout))

    program = jax.jit(run, out_shardings=sharding).lower(*arrays).compile()
    memory = program.memory_analysis()
    return Call(program, arrays), 0 if memory is None else memory.temp_size_in_bytes
