"""The one seam between _attention and _ffi: makes a call on each device's own batch entries.

Today it knows two of JAX's transformations. vmap: any subset of the operands, any number of times,
becomes more batch entries of one call. shard_map: inside it the call runs on the local shards.

A custom call is opaque to XLA's partitioner, so under automatic and explicit meshes operands are
still gathered and results replicated. Issue 4 changes that here: custom_partitioning for automatic
axes, jax.shard_map by the operands' types for explicit ones; both shard batch and heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from . import _ffi
from ._problem import Config, Masks


def fwd(
    config: Config,
    num_heads: tuple[int, int] | None,
    first_head: tuple[int, int, int],
    query: Array,
    key: Array,
    value: Array,
    masks: Masks,
) -> tuple[Array, Array]:
    """_ffi.fwd under vmap and shard_map."""

    def call(query: Array, key: Array, value: Array, masks: Masks) -> tuple[Array, Array]:
        return _ffi.fwd(
            config, query, key, value, masks, num_heads=num_heads, first_head=first_head
        )

    return _vmap_as_batch(call)(query, key, value, masks)


def bwd(
    config: Config,
    num_heads: tuple[int, int] | None,
    first_head: tuple[int, int, int],
    query: Array,
    key: Array,
    value: Array,
    masks: Masks,
    *results: Array,
) -> tuple[Array, ...]:
    """_ffi.bwd under vmap and shard_map; results: out, lse, dout, dlse."""

    def call(query: Array, key: Array, value: Array, masks: Masks, *results: Array) -> Any:
        out, lse, dout, dlse = results
        heads = {"num_heads": num_heads, "first_head": first_head}
        return _ffi.bwd(config, query, key, value, masks, out, lse, dout, dlse, **heads)

    return _vmap_as_batch(call)(query, key, value, masks, *results)


def segment_intervals(
    query_segment_ids: Array, key_value_segment_ids: Array
) -> tuple[Array, Array]:
    """_ffi.segment_intervals under vmap and shard_map."""
    return _vmap_as_batch(_ffi.segment_intervals)(query_segment_ids, key_value_segment_ids)


def _vmap_as_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """function of pytrees of arrays [B, ...], with vmap's axis made the minor part of B.

    Minor, because then a batch that is sharded over devices stays where it is.
    """
    call = custom_vmap(function)

    @call.def_vmap
    def rule(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        batch = args[0].shape[1 if in_batched[0] else 0]

        def fold(x: Array, batched: bool) -> Array:
            x = jnp.moveaxis(x, 0, 1) if batched else x[:, None]
            x = jnp.broadcast_to(x, (batch, axis_size, *x.shape[2:]))
            return x.reshape(batch * axis_size, *x.shape[2:])

        def unfold(x: Array) -> Array:
            return jnp.moveaxis(x.reshape(batch, axis_size, *x.shape[1:]), 1, 0)

        results = jax.tree.map(unfold, call(*jax.tree.map(fold, args, tuple(in_batched))))
        return results, jax.tree.map(lambda _: True, results)

    return call
