"""Value with its keys innermost, as 8-bit WGMMA wants it (cpp/fp8/transpose.h), in plain JAX."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from ._ffi import BLOCK, blocks


def transposed(x: Array, scales: Array) -> Array:
    """e4m3 [B, N, H, blocks of T * BLOCK] of [B, T, N, H] and its scales: 0 behind the last row, and in
    blocks whose scale is NaN. Of each 16 keys, the one at slot 4 c + 2 h + e is 8 h + 2 c + e."""
    batch, length, heads, head_dim = x.shape
    count = blocks(length)
    bits = lax.bitcast_convert_type(x, jnp.uint8)
    bits = jnp.pad(bits, ((0, 0), (0, count * BLOCK - length), (0, 0), (0, 0)))
    bits = bits.reshape(batch, count, -1, 2, 4, 2, heads, head_dim)
    bits = jnp.where(jnp.isnan(scales)[:, :, None, None, None, None, :, None], 0, bits)
    bits = bits.transpose(0, 6, 7, 1, 2, 4, 3, 5).reshape(batch, heads, head_dim, count * BLOCK)
    return lax.bitcast_convert_type(bits, x.dtype)


def undone(x: Array, length: int) -> Array:
    """[B, T, N, H] of that."""
    batch, heads, head_dim, rows = x.shape
    x = x.reshape(batch, heads, head_dim, -1, 4, 2, 2).transpose(0, 3, 5, 4, 6, 1, 2)
    return x.reshape(batch, rows, heads, head_dim)[:, :length]
