"""MaxDiffusion: `attention: "jax_fa3"`, a kernel of its registry, after `install()`."""

from __future__ import annotations

import importlib
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from .. import context_parallel
from .._attention import dot_product_attention
from .._problem import Implementation
from ._project import refuse

KERNEL = "jax_fa3"  # of MaxDiffusion's key `attention`
_MODULES = "maxdiffusion.models.attention_dispatch", "maxdiffusion.models.attention_flax"


def install(
    *, implementation: Implementation | None = None, deterministic_backward: bool = False
) -> None:
    """Registers the kernel "jax_fa3" with MaxDiffusion's `register_kernel`.

    MaxDiffusion has no releases: this was written for its sources of 2026 (7cfb880, 3418e91), in which
    the registry stands in one of two modules.

    Args: of `jax_fa3.dot_product_attention`.

    Full attention of images and videos, self and cross, with masks of keys [B, K]: the kernels take
    those that keep one run of keys in each sequence, such as a text padded at its end, and read others as
    a bias. Sharded over batch and heads by MaxDiffusion's rules; a sequence that is split over one mesh
    axis is a ring, without masks. Sequences shorter than `flash_min_seq_length`
    run MaxDiffusion's own "dot_product". A remat policy that saves `residual_checkpoint_name` saves what
    the backward needs.

    The kernel raises NotImplementedError, while it is traced, for a sequence over several mesh axes, and
    for a mask in a ring.
    """
    found: Any = None
    for name in _MODULES:
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
        if hasattr(found, "register_kernel"):
            break
    options = {
        "implementation": implementation,
        "deterministic_backward": deterministic_backward,
    }
    linen: Any = importlib.import_module("flax.linen")

    def kernel(query: Array, key: Array, value: Array, context: Any) -> Array:
        spec = linen.logical_to_mesh_axes(context["axis_names_q"])
        return _attend(spec, options, query, key, value, context)

    found.register_kernel(KERNEL)(kernel)


def _attend(
    spec: PartitionSpec,
    options: dict[str, Any],
    query: Array,
    key: Array,
    value: Array,
    context: Any,
) -> Array:
    """[B, T, N * H] of arrays [B, T, N * H] or [B, N, T, H]; spec is of the second form."""
    batch, heads, length = (*spec, None, None, None)[:3]
    mesh = context["mesh"]
    arguments: dict[str, Any] = {"scale": context["scale"], "compute_dtype": context["dtype"]}
    name = context.get("residual_checkpoint_name")
    arguments |= {} if name is None else {"checkpoint_name": name}
    mask = context.get("attention_mask")
    axes = [x for x in (length if isinstance(length, tuple) else (length,)) if x is not None]
    axes = [x for x in axes if mesh is not None and mesh.shape[x] > 1]
    attend: Any = dot_product_attention
    if axes:
        if len(axes) > 1:
            raise refuse("axis_names_q", f"{axes} for the length", "one mesh axis")
        if mask is not None:
            raise refuse("attention_mask", "it where the sequence is split", "None")
        attend = context_parallel.dot_product_attention
        arguments["axis_name"] = axes[0]
    elif mask is not None:
        arguments["mask"] = (mask != 0)[:, None, None, :]
    if mesh is not None and mesh.size > 1:
        arguments["sharding"] = NamedSharding(
            mesh, PartitionSpec(batch, axes[0] if axes else None, heads)
        )
    count = context["heads"]
    out = attend(*(_by_head(x, count) for x in (query, key, value)), **arguments, **options)
    return out.reshape(*out.shape[:2], -1)


def _by_head(x: Array, heads: int) -> Array:
    """[B, T, N, H]."""
    if x.ndim == 4:
        return jnp.swapaxes(x, 1, 2)
    return x.reshape(*x.shape[:2], heads, -1)
