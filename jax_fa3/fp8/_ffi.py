"""The custom calls of this package; one function per target, as in ../_ffi.py."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._custom_call import attributes_of, custom_call
from .._problem import Config, Masks
from .._targets import FWD_FP8, QUANTIZE

# Rows that have one scale, and keys that the kernel transposes V by.
BLOCK = 128


class Transposed(NamedTuple):
    """Value as the kernel wants it, in place of [B, S, K, V] (_transposed.py). A pytree."""

    value: Array  # e4m3 [B, K, V, blocks of S * BLOCK]


class Unquantized(NamedTuple):
    """What is to be quantized, and how. A pytree."""

    x: Array  # [B, T, N, H]
    signs: Array | None  # fp32 [1 or B, H], for a Hadamard transform before
    lengths: Array | None  # int32 [B]
    top: Array | None = None  # for "tensor" alone: the greatest magnitude of all, [1 or B, 1, 1]
    mean: Array | None = None  # fp32 [B, N, H], subtracted from each row before


def fwd(
    config: Config,
    dtype: np.dtype,
    tensors: tuple[Array, Array, Array | Transposed],
    scales: tuple[Array, Array, Array],
    masks: Masks,
    value_mean: Array | None = None,
    sinks: Array | None = None,
) -> tuple[Array, Array]:
    """The forward kernel: out [B, T, N, H] in dtype, and lse, fp32 [B, N, T].

    Args:
        dtype: bf16, fp16 or fp32.
        tensors: query, key and value, e4m3 [B, T, N, H], [B, S, K, H], [B, S, K, H], or Transposed.
        scales: theirs, fp32 [B, blocks of T, N], [B, blocks of S, K] twice.
        value_mean: fp32 [B, K, H], added to every row of value.
        sinks: fp32 [1 or B, N].
    """
    query, key, value = tensors
    query_scale, key_scale, value_scale = scales
    batch, length, heads, head_dim_v = query.shape  # the kernel takes H = V
    _, key_length, kv_heads, _ = key.shape
    columns = blocks(key_length) * BLOCK
    given = isinstance(value, Transposed)
    of_value = jax.ShapeDtypeStruct((batch, kv_heads, head_dim_v, columns), jnp.uint8)
    results = {
        "out": jax.ShapeDtypeStruct((batch, length, heads, head_dim_v), dtype),
        "lse": jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        # Of tiles, of what is transposed, and of that in each block.
        "counters": jax.ShapeDtypeStruct((2 + batch * kv_heads * blocks(key_length),), jnp.int32),
        # V with its keys innermost, as FP8 WGMMA wants it.
        "transposed_value": jax.ShapeDtypeStruct((0,), jnp.uint8) if given else of_value,
    }
    found = custom_call(
        FWD_FP8,
        results,
        attributes_of(config, (heads, kv_heads), (0, 0, 0), head_dim_v),
        query=query,
        key=key,
        value=None if given else value,
        query_scale=query_scale,
        key_scale=key_scale,
        value_scale=value_scale,
        value_mean=value_mean,
        **masks._asdict(),
        sinks=sinks,
        value_transposed=value.value if given else None,
    )
    return found["out"], found["lse"]


def quantize(transposed: bool, given: Unquantized) -> tuple[Array, Array]:
    """The kernel for _quantize.plain with one scale per block, of bf16 or fp16: e4m3 [B, T, N, H], or
    transposed, and its scales, fp32 [B, blocks of T, N]."""
    x, signs, lengths, _, mean = given
    if signs is not None and signs.shape[0] > 1:  # under vmap; the kernel takes the same for all
        mean = None if mean is None else mean * signs[:, None]
        x, signs = x * signs[:, None, None].astype(x.dtype), jnp.ones_like(signs)
    signs = None if signs is None else signs[0]
    batch, length, heads, head_dim = x.shape
    count = blocks(length)
    name, shape = "quantized", x.shape
    if transposed:
        name, shape = "transposed", (batch, heads, head_dim, count * BLOCK)
    results = {
        name: jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn),
        "scales": jax.ShapeDtypeStruct((batch, count, heads), jnp.float32),
    }
    found = custom_call(QUANTIZE, results, {}, x=x, signs=signs, lengths=lengths, mean=mean)
    return found[name], found["scales"]


def blocks(length: int) -> int:
    """The blocks of a sequence, of which the last may be short; symbolic lengths as well."""
    return (length + BLOCK - 1) // BLOCK
