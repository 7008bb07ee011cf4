"""What this package cannot take, and its kernels."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _dispatch
from .._checks import array, wrong
from .._operands import Call
from .._problem import E4M3
from ._ffi import BLOCK, blocks


def refusal(call: Call) -> str | None:
    """Why the FP8 kernel cannot take these arguments, beside their dtypes; None if it can."""
    sizes = call.operands.sizes
    if sizes.head_dim_v != sizes.head_dim:
        found = f"head dim {sizes.head_dim_v} beside {sizes.head_dim} of query"
        return f"value: got {found}, wanted the same in FP8, or {_dispatch.ELSEWHERE}"
    return _dispatch.refusal_of_options(call) or refusal_of_head_dim("query", sizes.head_dim)


def refusal_of_head_dim(name: str, head_dim: int) -> str | None:
    reason = _dispatch.refusal_of_build(name, E4M3, head_dim, head_dim)
    if reason is None and (head_dim % 16 or head_dim < 64):
        wanted = "wanted a multiple of 16 from 64 to 256 in FP8: pad it with zeros"
        reason = f"{name}: got head dim {head_dim}, {wanted}, or {_dispatch.ELSEWHERE}"
    return reason


def check_not_quantized(name: str, x: Array) -> None:
    """That x is something to quantize."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise wrong(name, f"dtype {x.dtype}", "a floating dtype such as bfloat16")
    if x.dtype.itemsize < 2:
        wanted = "16 bits or more, such as bfloat16; jax_fa3.fp8.quantized_dot_product_attention"
        raise wrong(name, f"dtype {x.dtype}", f"{wanted} takes what is quantized already")


def check_e4m3(name: str, x: Array) -> None:
    if x.dtype != E4M3:
        wanted = f"{E4M3}: jax_fa3.fp8.quantize gives it, with the scales"
        raise wrong(name, f"dtype {x.dtype}", wanted)


def checked_scale(name: str, x: Any, shape: tuple[int, ...], batched: bool) -> Array:
    """x as fp32 [B, blocks, heads], for an array [B, length, heads, H]."""
    if x is None:
        raise wrong(name, None, "fp32 scales, which jax_fa3.fp8.quantize gives")
    scale = array(name, x, None if isinstance(x, Array) else jnp.float32)
    if scale.dtype != jnp.float32:
        raise wrong(name, f"dtype {scale.dtype}", "float32")
    batch, length, heads, _ = shape
    full = batch, blocks(length), heads
    wanted = full if batched else full[1:]
    fits = scale.ndim == len(wanted) and all(
        n in (1, m) for n, m in zip(scale.shape, wanted, strict=True)
    )
    if scale.ndim and not fits:
        form = "[B, blocks of 128 rows, heads]" if batched else "[blocks of 128 rows, heads]"
        raise wrong(name, f"shape {scale.shape}", f"{wanted}, {form}, or 1 for any of them, or ()")
    return jnp.broadcast_to(scale.reshape((1,) * (3 - scale.ndim) + scale.shape), full)


def checked_mean(name: str, mean: Any, shape: tuple[int, ...]) -> Array | None:
    """mean as fp32, of an array of this shape, [B, T, N, H] or without B: its shape without T."""
    if mean is None:
        return None
    mean, wanted = array(name, mean), (*shape[:-3], *shape[-2:])
    if mean.shape != wanted or not jnp.issubdtype(mean.dtype, jnp.floating):
        raise wrong(name, f"{mean.dtype}{list(mean.shape)}", f"float32{list(wanted)}")
    return mean.astype(jnp.float32)


def checked_transposed(value: Array, key_shape: tuple[int, ...]) -> Array:
    """value as quantize(transposed=True) gives it, beside a key of this shape; whose checks come later."""
    if len(key_shape) < 3:
        return value
    *batch, length, heads, head_dim = key_shape
    wanted = *batch, heads, head_dim, blocks(length) * BLOCK
    if value.shape != wanted:
        form = "[B, K, V, blocks of S * 128]" if batch else "[K, V, blocks of S * 128]"
        raise wrong("value", f"shape {value.shape}", f"{wanted}, {form} beside value_transposed")
    return value


def checked_result_dtype(dtype: Any) -> np.dtype:
    for allowed in (jnp.bfloat16, jnp.float16, jnp.float32):
        if dtype == np.dtype(allowed):
            return np.dtype(allowed)
    raise wrong("dtype", repr(dtype), "bfloat16, float16 or float32")
