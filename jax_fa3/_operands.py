"""The one object that carries a call, and its operands: query, key and value, in any of the three ways
in which arrays hold them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from ._problem import Config, Implementation, Masks, SegmentIds, Sizes

# Of Operands, those that are one number for each query head; twin of cpp/common/per_head.h.
PER_HEAD = "sinks", "alibi_slopes"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """A pytree. Its gradient is one like it, and so are its letters (`_sharding`), strings for arrays.

    Query, key and value lie in one of three ways:
        three arrays   query [B, T, N, H], key [B, S, K, H], value [B, S, K, V]
        packed         query holds all: [B, T, N + 2K, H], or [B, T, 3, N, H], whose N can be split
        side by side   query [B, T, N, H], and key holds both: [B, S, K, H + V]
    """

    query: Array
    key: Array | None = None
    value: Array | None = None
    _: dataclasses.KW_ONLY
    sinks: Array | None = None  # [1 or B, N], fp32 (fp64)
    bias: Array | None = None  # [B or 1, N or 1, T or 1, S or 1], and so is mask
    mask: Array | None = None  # or intervals, int32 [B, 1, T, 2 M] (_mask_bits.py)
    scale: Any = None  # [], in place of Config's; plain JAX alone takes it
    dropout: Array | None = None  # [B, N, 2], uint32: which weights (_dropout.py)
    alibi_slopes: Array | None = None  # [1 or B, N], as sinks
    relative_bias: Array | None = None  # [1 or B, N, T + S], as sinks (_relative_bias.py)
    # (N, K) of a packed array; of the whole array, while `heads` is of a device's part of it.
    packed: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def heads(self) -> tuple[int, int]:
        """The (N, K) that are here."""
        if self.packed is None:
            return self.query.shape[2], self._key.shape[2]
        return self.packed if self.query.ndim == 4 else (self.query.shape[3], self.query.shape[3])

    @property
    def sizes(self) -> Sizes:
        batch, query_length, *_, head_dim = self.query.shape
        if self.packed is not None:
            return Sizes(batch, query_length, query_length, *self.heads, head_dim, head_dim)
        columns, key_length = self._key.shape[3], self._key.shape[1]
        head_dim_v = columns - head_dim if self.value is None else self.value.shape[3]
        return Sizes(batch, query_length, key_length, *self.heads, head_dim, head_dim_v)

    @property
    def letters(self) -> Any:
        """Of each array's dimensions, as `_sharding` has them."""

        def dense(x: Array | None) -> str | None:
            if x is None or not x.ndim:
                return None if x is None else ""
            heads = self.result_letters[1][1] if x.shape[1] > 1 else "."
            return ("b" if x.shape[0] == self.query.shape[0] else ".") + heads + ".."

        three: Any = "btnh", "b.k.", None if self.value is None else "b.k."
        if self.packed is not None:
            # [B, T, N + 2K, H] has three kinds of heads in one dimension: no device's part would
            # hold some of each.
            three = "bt.nh" if self.query.ndim == 5 else "bt.h", None, None
        others: Any = {name: dense(getattr(self, name)) for name in ("bias", "mask", "scale")}
        heads = self.result_letters[1][1]
        for name in PER_HEAD:
            others[name] = None if getattr(self, name) is None else "." + heads
        if (x := self.relative_bias) is not None:
            others["relative_bias"] = (
                "b" if x.shape[0] == self.query.shape[0] else "."
            ) + f"{heads}."
        others["dropout"] = None if self.dropout is None else f"b{heads}."
        return Operands(*three, **others, packed=self.packed)

    @property
    def result_letters(self) -> tuple[str, str]:
        """Of out [B, T, N, V] and lse [B, N, T]."""
        if self.packed is not None:
            return ("btnh", "bnt") if self.query.ndim == 5 else ("bt.h", "b.t")
        same = self.value is not None and self.value.shape[-1] == self.query.shape[-1]
        return "btnh" if same else "btn.", "bnt"

    def split(self) -> tuple[Array, Array, Array]:
        """query, key and value, an array each."""
        if self.packed is not None:
            num_heads, num_kv_heads = self.heads
            places = num_heads, num_heads + num_kv_heads
            query, key, value = jnp.split(self._one_dimension_of_heads, places, axis=2)
        elif self.value is None:
            query, (key, value) = self.query, jnp.split(self._key, [self.query.shape[3]], axis=3)
        else:
            query, key, value = self.query, self._key, self.value
        return query, key, value

    def joined(self, query: Array, key: Array, value: Array) -> tuple[Array, ...]:
        """The inverse of split, as the arrays of a pytree like this; of three arrays or packed."""
        if self.packed is None:
            return query, key, value
        return (jnp.concatenate((query, key, value), axis=2).reshape(self.query.shape),)

    def located(self) -> Located:
        """Where the kernels find query, key and value, without a copy."""
        key, value = self.key, self.value
        first_heads, first_column_v = (0, 0, 0), 0
        if self.packed is not None:
            num_heads, num_kv_heads = self.heads
            query = key = value = self._one_dimension_of_heads
            first_heads = 0, num_heads, num_heads + num_kv_heads
        else:
            query = self.query
        if value is None:
            value, first_column_v = key, query.shape[3]
        arrays = {"query": query, "key": key, "value": value}
        return Located(arrays, first_heads, first_column_v)

    @property
    def _key(self) -> Array:
        assert self.key is not None  # else packed
        return self.key

    @property
    def _one_dimension_of_heads(self) -> Array:
        """The packed array as [B, T, N + 2K, H]."""
        if self.query.ndim == 4:
            return self.query
        batch, length, three, num_heads, head_dim = self.query.shape
        return self.query.reshape(batch, length, three * num_heads, head_dim)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """One call's checked arguments. A pytree of its arrays."""

    operands: Operands
    masks: Masks
    segment_ids: SegmentIds | None
    config: Config = dataclasses.field(metadata={"static": True})
    # From _dispatch.checked_implementation.
    implementation: Implementation | tuple[Any, ...] | None = dataclasses.field(
        metadata={"static": True}
    )
    sharding: NamedSharding | PartitionSpec | None = dataclasses.field(metadata={"static": True})
    # Whether the arguments have a batch axis; the operands always do.
    batched: bool = dataclasses.field(metadata={"static": True})
    return_residual: bool = dataclasses.field(metadata={"static": True})
    # Of out where compute_dtype is given: what query had before it was cast.
    result_dtype: np.dtype | None = dataclasses.field(default=None, metadata={"static": True})
    dropout: Array | None = None  # [2], uint32, from the user's key: Operands.dropout is made of it

    def finish(self, out: Array, lse: Array) -> Any:
        """What the user asked for, of out [B, T, N, V] and lse [B, N, T]. To be called inside jit:
        jax_debug_infs looks at every result, and so must not see an lse that nobody asked for."""
        out = out if self.result_dtype is None else out.astype(self.result_dtype)
        found = (out, jnp.swapaxes(lse, 1, 2)) if self.return_residual else out
        return found if self.batched else jax.tree.map(lambda x: x[0], found)


class Located(NamedTuple):
    """The arrays of the forward kernel by their names (_targets.py), and where in them query, key and
    value begin."""

    arrays: dict[str, Any]
    first_heads: tuple[int, int, int]
    first_column_v: int


class Rows(NamedTuple):
    """What the backward is given of every query row. A pytree."""

    out: Array | None  # [B, T, N, V]
    lse: Array  # [B, N, T], fp32 (fp64), as are dlse and lse_low
    dout: Array  # the cotangents of out and lse
    dlse: Array | None  # None: 0. Where out is None, dlse - rowsum(dout * out)
    lse_low: Array | None = None  # what lse lost to its rounding, if that is known

    def whole_dlse(self) -> Array:
        """dlse, or zeros."""
        return jnp.zeros_like(self.lse) if self.dlse is None else self.dlse

    def letters(self, operands: Operands) -> Any:
        out, lse = operands.result_letters
        letters = out, lse, out, lse, lse
        return tuple(None if x is None else y for x, y in zip(self, letters, strict=True))


def batch_letters(arrays: Any, batch: int) -> Any:
    """Of a pytree of arrays [B or 1, ...] that are whole in all but the batch."""
    return jax.tree.map(
        lambda x: ("b" if x.shape[0] == batch else ".") + "." * (x.ndim - 1), arrays
    )
