"""ALiBi (Press et al., arXiv 2108.12409): slope * (key - query row) is added to the scaled scores, from
positions alone, so no array has T x S elements. The slopes' gradient comes in parts that have one order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ._kernel_sizes import bwd_tile
from ._problem import Sizes

_THREADS = 256  # kBwdConsumerThreads of cpp/plan.h


def term(slopes: Array, rows: Array, key_length: int) -> Array:
    """What is added to the scores [..., rows, S]: of slopes [..., 1, 1] and rows [..., R], int32."""
    keys = jnp.arange(key_length, dtype=jnp.int32)
    return slopes * (keys - rows[..., None]).astype(slopes.dtype)


def parts(sizes: Sizes, workspace: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Of the gradient, as the backward writes it: one of each thread that computes dS of a head."""
    split, tile = workspace.get("dkv_parts"), bwd_tile(max(sizes.head_dim, sizes.head_dim_v))
    blocks = (sizes.key_length + tile.block_n - 1) // tile.block_n
    ctas = blocks * (1 if split is None else split.shape[0])
    shape = sizes.batch, sizes.num_heads, ctas * _THREADS
    return {"dalibi": jax.ShapeDtypeStruct(shape, jnp.float32)}
