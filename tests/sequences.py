"""Cases of cases.py over a mesh axis: what the tests of context parallelism share."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from helpers import Results, with_gradients
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fa3 import _mask, context_parallel
from jax_fa3._broken import row_sums
from jax_fa3._operands import Operands, Rows
from jax_fa3._problem import Config, Masks
from jax_fa3.context_parallel import _steps
from jax_fa3.context_parallel._layout import Layout
from jax_fa3.context_parallel._masks import of_one_part
from jax_fa3.context_parallel._words import to_words

MESHES = {"sequence": 8, "batch": (2, 4), "heads": (2, 2, 2), "two": 2, "three": 3, "four": 4}
AXES = {
    "sequence": P(None, "sp"),
    "batch": P("data", "sp"),
    "heads": P("data", "sp", "model"),
    "two": P(None, "sp"),
    "three": P(None, "sp"),
    "four": P(None, "sp"),
}
PER_ROW = {"query_segment_ids", "key_value_segment_ids", "key_begin", "key_end"}


@dataclasses.dataclass(frozen=True)
class Split:
    """A way to split a sequence."""

    strategy: str = "ring"
    zigzag: bool = True
    mesh: str = "batch"
    inside: bool = True  # of shard_map; else by the argument `sharding`
    check_vma: bool = True

    def __str__(self) -> str:
        return " ".join(str(x) for x in dataclasses.astuple(self))

    @property
    def devices(self) -> int:
        return math.prod(np.atleast_1d(MESHES[self.mesh]))

    @property
    def sharding(self) -> NamedSharding:
        shape = np.atleast_1d(MESHES[self.mesh])
        names = {1: ("sp",), 2: ("data", "sp"), 3: ("data", "sp", "model")}[len(shape)]
        devices = np.reshape(jax.devices()[: self.devices], shape)
        return NamedSharding(Mesh(devices, names), AXES[self.mesh])

    def ordered(self, x: Any) -> Any:
        """A whole array [B, T, ...] as this split has it."""
        return context_parallel.to_zigzag(x, self.size) if self.zigzag else x

    def natural(self, x: Any) -> Any:
        return context_parallel.from_zigzag(x, self.size) if self.zigzag else x

    @property
    def size(self) -> int:
        return self.sharding.mesh.shape["sp"]

    def attention(self, *qkv: Array, **arguments: Any) -> tuple[Array, Array]:
        """jax_fa3's dot_product_attention of whole arrays in natural order, with its arguments."""
        arguments |= {k: self.ordered(x) for k, x in arguments.items() if k in PER_ROW}
        arguments |= {"axis_name": "sp", "strategy": self.strategy, "zigzag": self.zigzag}
        arguments |= {"return_residual": True}
        qkv = tuple(map(self.ordered, qkv))
        if self.inside:
            results = self._inside(qkv, arguments)
        else:
            results = context_parallel.dot_product_attention(
                *qkv, sharding=self.sharding, **arguments
            )
        out, lse = map(self.natural, results)
        return out, lse

    def _inside(self, qkv: Any, arguments: dict[str, Any]) -> Any:
        arrays = {k: x for k, x in arguments.items() if isinstance(x, np.ndarray)}
        static = {k: x for k, x in arguments.items() if k not in arrays}
        spec = self.sharding.spec
        # A batch of one stands for all entries.
        specs = {
            k: P(spec[0] if x.shape[0] > 1 else None, "sp" if k in PER_ROW else None)
            if x.ndim > 1
            else P(spec[0] if x.ndim and x.shape[0] > 1 else None)
            for k, x in arrays.items()
        }

        def local(qkv: Any, arrays: Any) -> Any:
            return context_parallel.dot_product_attention(*qkv, **static, **arrays)

        return jax.shard_map(
            local,
            mesh=self.sharding.mesh,
            in_specs=(spec, specs),
            out_specs=(spec, spec),
            check_vma=self.check_vma,
        )(qkv, arrays)

    def results(self, case: Case, dtype: Any, **arguments: Any) -> Results:
        """The case's results and gradients."""

        def attention(*qkv: Array) -> tuple[Array, Array]:
            return self.attention(*qkv, **case.arguments, **arguments)

        @jax.jit
        def call(cotangents: Any, inputs: Any) -> Results:
            return with_gradients(attention, cotangents, *inputs)

        return call(case.cotangents(dtype), case.inputs(dtype))


def in_steps(
    case: Case,
    parts: int,
    implementation: Any,
    inputs: tuple[Array, Array, Array],
    cotangents: tuple[Array, Array],
    *,
    deterministic: bool = False,
) -> Results:
    """The case's results as the ring has them, on one device, with the keys in equal parts: the last
    first."""
    query, key, value = inputs
    config = Config(case.scale or case.H**-0.5, (None, None), case.logits_soft_cap, deterministic)
    masks, layout, length = _all_masks(case), Layout("", parts, zigzag=False), case.S // parts
    key_value = jnp.concatenate([key, value], axis=-1)
    steps = [
        (
            key_value[:, part * length : (part + 1) * length],
            of_one_part(layout, masks, jnp.int32(part), length),
        )
        for part in reversed(range(parts))
    ]
    before: Any = None
    for i, (part, keys) in enumerate(steps):
        config = dataclasses.replace(config, partial=i + 1 < parts)
        before = _steps.forward(implementation, config, Operands(query, part), keys, before)
    out, lse = before
    dout, dlse = cotangents
    dlse = jnp.swapaxes(dlse, 1, 2) - row_sums(dout, out, jnp.float32)
    rows = Rows(None, lse, dout, dlse)
    config = dataclasses.replace(config, partial=True)
    dq, dkv = None, []
    for i, (part, keys) in enumerate(steps):
        words = jnp.pad(to_words(part), [(0, 0)] * 3 + [(0, 4 * i)])  # in the ring, gradients
        call = implementation, config, Operands(query, words), keys, rows, dq
        dq, *dpart = _steps.backward(*call, finish_dq=i + 1 == parts)
        dkv.insert(0, dpart)
    dk, dv = (jnp.concatenate(x, axis=1).astype(query.dtype) for x in zip(*dkv, strict=True))
    return Results(out, jnp.swapaxes(lse, 1, 2), dq, dk, dv)


def _all_masks(case: Case) -> Masks:
    """In key_begin and key_end; and the lengths, for what stands past them must not be read."""
    begin, end = _mask.key_intervals(case.T, case.S, batch=case.B, **case.mask)
    names = "query_seq_lengths", "key_value_seq_lengths"
    lengths = {name: jnp.asarray(case.mask[name]) for name in names if name in case.mask}
    return Masks(key_begin=begin, key_end=end, **lengths)
