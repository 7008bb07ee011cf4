"""Shapes of what the custom calls of right_calls are given."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_fa3._problem import Masks
from jax_fa3.fp8 import _ffi as _fp8

# Whole blocks of every kernel, and 64 rows in those of the backward, by which its workspace is counted:
# so that is exactly as large as it must be.
B, T, S, N, K, H, V = 2, 128, 160, 4, 2, 128, 64
Struct = jax.ShapeDtypeStruct


def operands_of(
    head_dim: int = H,
    head_dim_v: int = V,
    *,
    batch: int = B,
    length: int = T,
    key_length: int = S,
    heads: int = N,
    dtype: Any = jnp.bfloat16,
) -> tuple[Struct, Struct, Struct]:
    q = Struct((batch, length, heads, head_dim), dtype)
    k = Struct((batch, key_length, K, head_dim), dtype)
    return q, k, Struct((batch, key_length, K, head_dim_v), dtype)


def rows_of(
    length: int = T, heads: int = N, columns: int = V, dtype: Any = jnp.bfloat16
) -> tuple[Struct, ...]:
    """out, lse and their cotangents."""
    out = Struct((B, length, heads, columns), dtype)
    lse = Struct((B, heads, length), jnp.float32)
    return out, lse, out, lse


def masks_of() -> Any:
    shapes = [(1,), (B,), (B,), (B, T), (B, T)]
    arrays: Any = [Struct(shape, jnp.int32) for shape in shapes]
    return Masks(*arrays)


def fp8_operands(length: int, key_length: int, columns: int, heads: int = N) -> Any:
    dtype = jnp.float8_e4m3fn
    kv = Struct((B, key_length, K, columns), dtype)
    per_key = Struct((B, _fp8.blocks(key_length), K), jnp.float32)
    per_row = Struct((B, _fp8.blocks(length), heads), jnp.float32)
    return (Struct((B, length, heads, columns), dtype), kv, kv), (per_row, per_key, per_key)
