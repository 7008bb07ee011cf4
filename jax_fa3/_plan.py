"""The workspace of a call, by its names (_targets.py), as cpp/plan.h and cpp/problem.h have it.

Some sizes the compiled library decides when a call is traced. Without it, and where lengths are
symbolic, there is none of that: sums over very many keys and rows are less exact then, and few heads
do not fill the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _bias, _relative_bias
from ._custom_call import window_attribute
from ._kernel_sizes import BWD_FEWEST_ROWS
from ._operands import Operands
from ._problem import Config, Masks, Sizes

Workspace = dict[str, jax.ShapeDtypeStruct]


def fwd_workspace(library: ModuleType | None, sizes: Sizes, *, is_plain: bool) -> Workspace:
    """is_plain: nothing is masked, and there are no other operands or results to join with; then several
    CTAs may share the keys of a tile."""
    long_sums: tuple[int, ...] = (0,)
    if library is not None and _fit(sizes):
        batch, length, key_length, num_heads, _, head_dim, head_dim_v = sizes
        long_sums = (library.fwd_long_sums(key_length, head_dim, head_dim_v),)
        parts = key_splits(library, sizes) if is_plain else 1
        if parts > 1:
            long_sums = parts, batch * num_heads * length * (head_dim_v + 2)
    return {
        "tile_counter": jax.ShapeDtypeStruct((1,), jnp.int32),
        "long_sums": jax.ShapeDtypeStruct(long_sums, jnp.float32),
    }


def key_splits(library: ModuleType, sizes: Sizes) -> int:
    """How many CTAs share the keys of a tile in a forward that masks nothing."""
    return library.fwd_splits(sizes)


def bwd_workspace(
    library: ModuleType | None,
    config: Config,
    masks: Masks,
    sizes: Sizes,
    dtype: np.dtype,
    dq_accum: jax.ShapeDtypeStruct,
) -> Workspace:
    """For tiles of whichever height; `dq_accum` has their rows."""
    batch, _, key_length, num_heads, num_kv_heads, head_dim, head_dim_v = sizes
    rows = dq_accum.shape[2]
    blocks = rows // BWD_FEWEST_ROWS
    per_block = batch, num_heads, blocks
    workspace = {
        "row_stats": jax.ShapeDtypeStruct((*per_block, 3 * BWD_FEWEST_ROWS + 4), jnp.float32),
        "row_intervals": jax.ShapeDtypeStruct((batch, rows, 2), jnp.int32),
        "query_blocks": jax.ShapeDtypeStruct((batch, blocks + -(-blocks // 32), 8), jnp.int32),
        "dq_accum": dq_accum,
    }
    if config.deterministic_backward:
        workspace["turns"] = jax.ShapeDtypeStruct((math.prod(per_block),), jnp.int32)
    if dtype == jnp.float16:
        workspace["ranges"] = jax.ShapeDtypeStruct((batch, num_kv_heads, 3), jnp.int32)
    if parts := splits(library, config, masks, sizes):
        shape = parts, batch, key_length, num_kv_heads, head_dim + head_dim_v
        workspace["dkv_parts"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return workspace


def dsinks(sizes: Sizes, dq_accum: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """No workspace: what each block of query rows adds to the gradient of sinks; for tiles of whichever
    height, too."""
    blocks = dq_accum.shape[2] // BWD_FEWEST_ROWS
    return jax.ShapeDtypeStruct((sizes.batch, sizes.num_heads, blocks), jnp.float32)


def dbias(config: Config, bias: Array, workspace: Workspace) -> Workspace:
    """No workspace either: the gradient of a bias, as the kernels write it. One that is the same for all
    rows has a fixed order only where one CTA goes through them."""
    found = {"dbias": _bias.gradient_of(bias)}
    parts = workspace.get("dkv_parts")
    if config.deterministic_backward and bias.shape[2] == 1 and parts is not None:
        found["dkv_parts"] = jax.ShapeDtypeStruct((1, *parts.shape[1:]), parts.dtype)
    return found


def gradients_of_others(
    operands: Operands, wanted: Workspace, found: dict[str, Array]
) -> tuple[Array, ...]:
    """Of sinks and the terms of the scores, as far as they were wanted, from what the backward wrote."""
    finish: dict[str, Callable[[Array], Array]] = {
        "dsinks": lambda x: x.sum(-1),
        "dbias": lambda x: _bias.gradient(x, operands),
        "dalibi": lambda x: x.sum(-1),
        "drelative": lambda x: _relative_bias.gradient(x, operands.sizes),
    }
    return tuple(make(found[name]) for name, make in finish.items() if name in wanted)


def with_mask(mask: Array, sizes: Sizes, workspace: Workspace) -> Workspace:
    """Workspace that is other with a dense mask. Where it is of each head, heads have different numbers of
    steps, which the kernels do not share out."""
    parts, group = workspace.get("dkv_parts"), sizes.num_heads // max(sizes.num_kv_heads, 1)
    if parts is None or mask.shape[1] == 1 or group % parts.shape[0] == 0:
        return {}
    return {"dkv_parts": jax.ShapeDtypeStruct((1, *parts.shape[1:]), parts.dtype)}


def splits(library: ModuleType | None, config: Config, masks: Masks, sizes: Sizes) -> int:
    """How many CTAs share the query rows of a block of keys in the backward; 0 if it is one, which
    sums over them in one go."""
    if library is None or not _fit(sizes):
        return 0
    masked = config.window != (None, None) or any(mask is not None for mask in masks)
    window = tuple(map(window_attribute, config.window))
    return library.bwd_splits(sizes, window, masked, config.deterministic_backward)


def _fit(sizes: Sequence[Any]) -> bool:
    """Whether they are known, and not so large that the handlers refuse the call."""
    return all(not jax.export.is_symbolic_dim(n) and n < 2**31 for n in sizes)
