"""Rotary position embedding from tables of cosines and sines."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from .._problem import wide


class Tables(NamedTuple):
    """[L, rotary dims / 2] each: a row for each position from 0 on."""

    cos: Array
    sin: Array


def rotate(x: Array, tables: Tables, positions: Array, interleaved: bool) -> Array:
    """x [rows, heads, D] with its first dims, as many as the tables are for, rotated; rounded once.

    Args:
        positions: int32 [rows]; the tables' edges stand for what is beyond them.
        interleaved: a pair is two neighbours, and not a number of each half.
    """
    dtype = wide(x.dtype)
    at = jnp.clip(positions, 0, tables.cos.shape[0] - 1)
    cos, sin = (table.astype(dtype)[at][:, None] for table in tables)  # [rows, 1, pairs]
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].astype(dtype), x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
    both = a * cos - b * sin, b * cos + a * sin
    turned = jnp.stack(both, -1).reshape(turned.shape) if interleaved else jnp.concatenate(both, -1)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1)
