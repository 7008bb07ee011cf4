"""Blocks of query rows, which plain JAX (_xla.py) works on one after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# Scores held at a time, over batch, heads, the rows of a block and keys: 64 MiB in fp32.
BLOCK_SCORES = 2**24
MIN_ROWS, SYMBOLIC_ROWS = 16, 128


def rows_per_block(query: Array, key: Array) -> int:
    """R, so that a block's scores are at most BLOCK_SCORES; sizes known at trace time only."""
    sizes = batch, length, heads, key_length = *query.shape[:3], key.shape[1]
    if not all(isinstance(size, int) for size in sizes):
        return SYMBOLIC_ROWS
    rows = max(MIN_ROWS, BLOCK_SCORES // max(1, batch * heads * key_length))
    blocks = max(1, -(-length // rows))
    return max(1, -(-length // blocks))  # blocks of equal size pad least


def split(tree: Any, rows: int) -> Any:
    """[B, K, G, T, ...] to [T / R, B, K, G, R, ...]; the rows added to fill up see no key."""

    def parts(x: Array) -> Array:
        blocks = (x.shape[3] + rows - 1) // rows
        x = jnp.pad(x, [(0, blocks * rows - x.shape[3] if i == 3 else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:3], blocks, rows, *x.shape[4:]), 3, 0)

    return jax.tree.map(parts, tree)


def join(tree: Any, length: int) -> Any:
    """The inverse of split."""

    def whole(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], x.shape[3] * x.shape[4], *x.shape[5:])[:, :, :, :length]

    return jax.tree.map(whole, tree)
