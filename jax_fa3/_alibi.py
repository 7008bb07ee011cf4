"""ALiBi (Press et al., arXiv 2108.12409): slope * (key - query row) is added to the scaled scores, from
positions alone, so no array has T x S elements. The slopes' gradient comes in parts that have one order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ._kernel_sizes import MOST_KEYS_OF_SUM, bwd_tile, drifts
from ._operands import Operands
from ._problem import Config, Sizes

_THREADS = 256  # kBwdConsumerThreads of cpp/plan.h


def refusal(config: Config, operands: Operands) -> str | None:
    """Why the kernels take no slopes here."""
    found, sizes = "alibi_slopes: got some beside", operands.sizes
    if config.logits_soft_cap is not None:
        return f"{found} logits_soft_cap, wanted one of the two"
    if operands.bias is not None:
        return f"{found} a bias, wanted one of the two: add their term to it"
    if config.dropout:
        return f"{found} dropout, wanted one of the two"
    width = max(sizes.head_dim, sizes.head_dim_v)
    if not bwd_tile(width).fused:
        return f"{found} head dim {width}, wanted none beside more than 128"
    keys = sizes.key_length
    if drifts(keys):
        return f"{found} {keys} keys, wanted at most {MOST_KEYS_OF_SUM}"
    return None


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
