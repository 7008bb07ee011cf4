"""MaxDiffusion: `attention: "jax_fa3"`, a kernel of its registry, after `install()`."""

from __future__ import annotations

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import context_parallel
from .._attention import dot_product_attention
from .._problem import Implementation
from ._project import hook, refuse

KERNEL = "jax_fa3"  # of MaxDiffusion's key `attention`


def install(
    *, implementation: Implementation | None = None, deterministic_backward: bool = False
) -> None:
    """Registers the kernel "jax_fa3" with MaxDiffusion's `register_kernel`.

    MaxDiffusion has no releases: this was written for its sources of 2026, models/attention_flax.py as
    of 00ac80e and 3418e91.

    Args: of `jax_fa3.dot_product_attention`.

    Full and causal attention, self and cross, with masks of keys [B, K]: the kernels take those that keep
    one run of keys in each sequence, such as a text padded at its end, and read others as bits. Sharded
    over batch and heads by MaxDiffusion's rules. Where they split the rows alone, as in the cross
    attention of its Wan models, each device has all keys of its rows; where they split rows and keys over
    one mesh axis, it is a ring, without masks. A remat policy that saves `residual_checkpoint_name` saves
    what the backward needs. Of what a context has, block sizes, numbers of shards and the like mean
    nothing here.

    The kernel raises NotImplementedError, while it is traced, for keys that are split otherwise, and for
    a mask in a ring.
    """
    register_kernel = hook("maxdiffusion.models.attention_flax", "register_kernel")
    linen: Any = importlib.import_module("flax.linen")
    options = {
        "implementation": implementation,
        "deterministic_backward": deterministic_backward,
    }

    def kernel(query: Array, key: Array, value: Array, context: Any) -> Array:
        names = (context[x] for x in ("axis_names_q", "axis_names_kv"))
        specs = [(*linen.logical_to_mesh_axes(x), None, None, None)[:3] for x in names]
        arrays = [_by_head(x, context["heads"]) for x in (query, key, value)]
        out = _attend(specs, options, arrays, context)
        return out.reshape(*out.shape[:2], -1)

    register_kernel(KERNEL)(kernel)


def _attend(specs: list[Any], options: dict[str, Any], arrays: list[Array], context: Any) -> Array:
    """Of arrays [B, T, N, H]; specs are those of [B, N, T] of query and of key."""
    mesh = context["mesh"]
    batch, heads, _ = specs[0]
    rows, keys = (_split(mesh, spec[2]) for spec in specs)
    arguments: dict[str, Any] = {"scale": context["scale"], "compute_dtype": context["dtype"]}
    arguments |= {"is_causal": context.get("is_causal", False), **options}
    name = context.get("residual_checkpoint_name")
    arguments |= {} if name is None else {"checkpoint_name": name}
    mask = _keys_kept(context.get("attention_mask"), arrays)
    if rows and not keys:
        return _attend_by_rows(mesh, (batch, rows, heads), arguments, arrays, mask)
    if mesh is not None and mesh.size > 1:
        axis = rows[0] if rows else None
        arguments["sharding"] = NamedSharding(mesh, PartitionSpec(batch, axis, heads))
    if not keys:
        return dot_product_attention(*arrays, mask=mask, **arguments)
    if keys != rows or len(keys) != 1:
        raise refuse("axis_names_kv", f"{keys} for keys, {rows} for rows", "one mesh axis for both")
    if mask is not None:
        raise refuse("attention_mask", "it where keys are split", "None")
    return context_parallel.dot_product_attention(*arrays, axis_name=keys[0], **arguments)


def _attend_by_rows(
    mesh: Any, spec: Any, arguments: dict[str, Any], arrays: list[Array], mask: Array | None
) -> Array:
    """Each device computes its rows over all keys; spec is of query."""
    batch, rows, heads = spec
    query, *keys_and_values = arrays
    length = query.shape[1]
    padding = -length % math.prod(mesh.shape[x] for x in rows)

    def local(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
        first = lax.axis_index(rows) * query.shape[1] if arguments["is_causal"] else 0
        return dot_product_attention(query, key, value, mask=mask, query_offset=first, **arguments)

    whole = PartitionSpec(batch, None, heads)
    split: Any = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(*spec), whole, whole, PartitionSpec(batch)),
        out_specs=PartitionSpec(*spec),
    )
    padded = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    return split(padded, *keys_and_values, mask)[:, :length]


def _keys_kept(mask: Array | None, arrays: list[Array]) -> Array | None:
    """bool [B, 1, 1, S] of [B or 1, any length]: MaxDiffusion hides keys after a mask's end."""
    if mask is None:
        return None
    batch, length = arrays[1].shape[:2]
    mask = mask[:, :length] != 0
    mask = jnp.pad(mask, ((0, 0), (0, length - mask.shape[1])))
    return jnp.broadcast_to(mask, (batch, length))[:, None, None]


def _split(mesh: Any, axes: Any) -> tuple[str, ...]:
    """The mesh axes that split something."""
    names = axes if isinstance(axes, tuple) else (axes,)
    return tuple(x for x in names if x is not None and mesh is not None and mesh.shape[x] > 1)


def _by_head(x: Array, heads: int) -> Array:
    """[B, T, N, H] of [B, N, T, H] or [B, T, N * H]."""
    if x.ndim == 4:
        return jnp.swapaxes(x, 1, 2)
    return x.reshape(*x.shape[:2], heads, -1)
