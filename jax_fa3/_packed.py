"""The operands of a call: three arrays, or the one packed array that holds them side by side."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from ._ffi import Heads

# query, key and value; or the one packed array, of whose heads N, K, K are these three: they are one
# dimension, or two, [3, N], of which devices can split the second.
Operands = tuple[Array, ...]
Packed = tuple[int, int] | None  # (N, K), where the operands are packed


def for_kernel(
    packed: Packed, operands: Operands
) -> tuple[tuple[Array, Array, Array], dict[str, Any]]:
    """query, key and value, and which of their heads are meant."""
    if packed is None:
        query, key, value = operands
        return (query, key, value), {}
    qkv, (num_heads, num_kv_heads) = _one_dimension_of_heads(packed, operands[0])
    first = 0, num_heads, num_heads + num_kv_heads
    return (qkv, qkv, qkv), {"heads": Heads((num_heads, num_kv_heads), first)}


def split(packed: Packed, operands: Operands) -> tuple[Array, Array, Array]:
    """query, key and value."""
    if packed is not None:
        qkv, (num_heads, num_kv_heads) = _one_dimension_of_heads(packed, operands[0])
        operands = tuple(jnp.split(qkv, (num_heads, num_heads + num_kv_heads), axis=2))
    query, key, value = operands
    return query, key, value


def _one_dimension_of_heads(heads: tuple[int, int], qkv: Array) -> tuple[Array, tuple[int, int]]:
    """[B, T, 3, N, H] as [B, T, N + 2K, H], and the (N, K) that are here: a device has its own N."""
    if qkv.ndim == 4:
        return qkv, heads
    batch, length, _, num_heads, head_dim = qkv.shape
    return qkv.reshape(batch, length, 3 * num_heads, head_dim), (num_heads, num_heads)
