"""Attention of e4m3 arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from .. import _arguments, _dispatch, _guards
from .._arguments import Options
from .._autodiff import Method, compute
from .._checks import array, wrong
from .._operands import Operands, batch_letters
from .._problem import Masks
from . import _ffi, _xla
from ._checks import (
    check_e4m3,
    checked_mean,
    checked_result_dtype,
    checked_scale,
    checked_transposed,
    refusal,
)
from ._means import refuse_smoothing


class _Options(Options, total=False):
    dtype: DTypeLike
    value_mean: ArrayLike | None
    value_transposed: bool


# fmt: off
@overload
def quantized_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike,
    query_scale: ArrayLike, key_scale: ArrayLike, value_scale: ArrayLike, *,
    return_residual: Literal[False] = False, **options: Unpack[_Options],
) -> Array: ...
@overload
def quantized_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike,
    query_scale: ArrayLike, key_scale: ArrayLike, value_scale: ArrayLike, *,
    return_residual: Literal[True], **options: Unpack[_Options],
) -> tuple[Array, Array]: ...
# fmt: on


def quantized_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    query_scale: ArrayLike,
    key_scale: ArrayLike,
    value_scale: ArrayLike,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    value_mean: ArrayLike | None = None,
    value_transposed: bool = False,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """jax_fa3.dot_product_attention of quantized arrays: each e4m3 number times its block's scale.

    FlashAttention-3 in FP8 (arXiv 2407.08608, section 3.3) on Hopper GPUs; elsewhere the same numbers
    in plain JAX and fp32. For arrays that are e4m3 already, such as a model's KV cache.

    Args:
        query, key, value: float8_e4m3fn [B, T, N, H], [B, S, K, H], [B, S, K, V], or all without B.
            The kernel takes H = V, a multiple of 16 from 64 to 256.
        query_scale, key_scale, value_scale: fp32 [B, ceil(T / 128), N], [B, ceil(S / 128), K] twice,
            without B if query lacks it: one for each 128 rows of a head, as `quantize` gives them. Any
            size may be 1, for all; so may the shape be (). They should be positive and finite, and not
            subnormal: a query row whose scale is not, or that sees a key whose scale or whose value's
            scale is not, gives NaN. Its log-sum-exp is NaN if the scale is query's or key's, and
            means nothing if it is value's. Those of value should be 3e-36 or more.
        dtype: of the result; bfloat16, float16 or float32.
        value_mean: [B, K, V], floating: what was subtracted from value before it was quantized
            (`quantize`), for the result to have it again; None for nothing.
        value_transposed: whether value is what `quantize` gave with transposed=True, [B, K, V,
            ceil(S / 128) * 128] or without B; V = H, and value_scale is by the same blocks.
        options: those of jax_fa3.dot_product_attention except bias, mask, several intervals a row,
            alibi_slopes, relative_bias, dropout, deterministic_backward, checkpoint_name and
            compute_dtype; scale is static.

    Returns:
        [B, T, N, V] in dtype. With return_residual a tuple of it and the log-sum-exp, fp32 [B, T, N].
        The kernel rounds the softmax's weights to e4m3 for their product with value.

    Padding past the lengths may hold anything, as there, and so may the scales of blocks that are
    padding as a whole. It has no derivative, and says so: `dot_product_attention` has.

    Raises:
        ValueError: as jax_fa3.dot_product_attention; other dtypes, float8_e5m2 too; scales that are
            missing or of other shapes.
        NotImplementedError: bias, mask, several intervals a row, alibi_slopes, relative_bias, dropout, a
            traced scale, differentiation; with "fa3", what the kernel does not support, and other
            devices.
    """
    refuse_smoothing(options)
    names = "query", "key", "value"
    tensors = [*map(array, names, (query, key, value))]
    for name, x in zip(names, tensors, strict=True):
        check_e4m3(name, x)
    by_columns = None
    if not isinstance(value_transposed, bool):
        raise wrong("value_transposed", repr(value_transposed), "True or False")
    if value_transposed:
        by_columns = checked_transposed(tensors[2], tensors[1].shape)
        tensors[2] = tensors[1]  # it has the shape that value had
    call = _arguments.parse_without_dense(
        "jax_fa3.fp8", *tensors, instead_of_scale="query_scale", **options
    )
    if call.config.deterministic_backward:
        raise wrong("deterministic_backward", True, "False, for there are no gradients")
    if call.result_dtype is not None:
        raise wrong("compute_dtype", options["compute_dtype"], "None: dtype is the result's")
    if call.config.checkpoint_names is not None:
        names = call.config.checkpoint_names
        raise wrong("checkpoint_name", names, "None, for there are no gradients")
    q, k, v = call.operands.split()
    scales = (
        checked_scale("query_scale", query_scale, q.shape, call.batched),
        checked_scale("key_scale", key_scale, k.shape, call.batched),
        checked_scale("value_scale", value_scale, v.shape, call.batched),
    )
    mean = checked_mean("value_mean", value_mean, v.shape if call.batched else v.shape[1:])
    mean = mean if mean is None or call.batched else mean[None]
    result = checked_result_dtype(dtype)
    if by_columns is not None and not call.batched:
        by_columns = by_columns[None]
    more = (*scales, mean, by_columns)
    operands, more = jax.tree.map(_guards.quantized, (call.operands, more))
    implementation = _dispatch.choose(call.implementation, refusal(call), stacklevel=2)
    method = Quantized(implementation, call.config, dtype=result)
    return compute(method, dataclasses.replace(call, operands=operands), more)


class Quantized(Method):
    """Of e4m3 arrays; `more` is the scales of query, key and value, value's mean, and value, where it
    is transposed."""

    def __call__(self, operands: Operands, masks: Masks, more: Any = None) -> tuple[Array, ...]:
        per_mask = batch_letters(masks, operands.sizes.batch)
        letters = operands.letters
        letters = letters.split(), self.letters(more), per_mask, letters.sinks
        static, results = (self.config, self.dtype), operands.result_letters
        call = self.implementation, _kernel, _plain, static, letters, results
        return _dispatch.run(*call, operands.split(), more, masks, operands.sinks)

    def letters(self, more: Any) -> Any:
        rest = zip(more[3:], ("bk.", "bk.."), strict=True)
        return "b.n", "b.k", "b.k", *(None if x is None else letters for x, letters in rest)


def _with(
    attend: Callable[..., Any],
    config: Any,
    dtype: Any,
    tensors: Any,
    more: Any,
    masks: Any,
    sinks: Any,
) -> Any:
    *scales, mean, by_columns = more
    if by_columns is not None:
        tensors = *tensors[:2], _ffi.Transposed(by_columns)
    return attend(config, dtype, tensors, tuple(scales), masks, mean, sinks)


_kernel = functools.partial(_with, _ffi.fwd)
_plain = functools.partial(_with, _xla.attention)
