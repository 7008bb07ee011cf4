"""Attention of e4m3 arrays."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from .. import _arguments, _autodiff, _dispatch, _guards, _mask, _sharding
from .._arguments import Implementation, Options
from .._autodiff import without_heads
from .._checks import array, refuse_dense, wrong
from .._jitted import jitted
from .._problem import Config, Masks, SegmentIds
from . import _ffi, _xla
from ._checks import check_e4m3, checked_result_dtype, checked_scale, config_of, refusal

Three = tuple[Array, Array, Array]


@overload
def quantized_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    query_scale: ArrayLike,
    key_scale: ArrayLike,
    value_scale: ArrayLike,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    return_residual: Literal[False] = False,
    **options: Unpack[Options],
) -> Array: ...


@overload
def quantized_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    query_scale: ArrayLike,
    key_scale: ArrayLike,
    value_scale: ArrayLike,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    return_residual: Literal[True],
    **options: Unpack[Options],
) -> tuple[Array, Array]: ...


def quantized_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    query_scale: ArrayLike,
    key_scale: ArrayLike,
    value_scale: ArrayLike,
    *,
    dtype: DTypeLike = jnp.bfloat16,
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
            means nothing if it is value's. Those of value may differ by a factor of 1e30.
        dtype: of the result; bfloat16, float16 or float32.
        options: those of jax_fa3.dot_product_attention except bias, mask and deterministic_backward;
            scale is static.

    Returns:
        [B, T, N, V] in dtype. With return_residual a tuple of it and the log-sum-exp, fp32 [B, T, N].
        The kernel rounds the softmax's weights to e4m3 for their product with value.

    Padding past the lengths may hold anything, as there, and so may the scales of blocks that are
    padding as a whole. It has no derivative, and says so: `dot_product_attention` has.

    Raises:
        ValueError: as jax_fa3.dot_product_attention; other dtypes, float8_e5m2 too; scales that are
            missing or of other shapes.
        NotImplementedError: bias, mask, a traced scale, differentiation; with "fa3", what the kernel
            does not support, and other devices.
    """
    refuse_dense(options, "jax_fa3.fp8")
    names = "query", "key", "value"
    arrays = [*map(array, names, (query, key, value))]
    for name, x in zip(names, arrays, strict=True):
        check_e4m3(name, x)
    tensors, sizes, batched = _arguments.operands(*arrays)
    call = _arguments.parse(sizes, batched, **options)
    if call.deterministic_backward:
        raise wrong("deterministic_backward", True, "False, for there are no gradients")
    scales = (
        checked_scale("query_scale", query_scale, tensors[0].shape, batched),
        checked_scale("key_scale", key_scale, tensors[1].shape, batched),
        checked_scale("value_scale", value_scale, tensors[2].shape, batched),
    )
    config, result = config_of(call, "query_scale"), checked_result_dtype(dtype)
    implementation = _dispatch.choose(call.implementation, refusal(call), stacklevel=2)
    static = implementation, config, result, call.sharding, call.return_residual
    return call.results(*_attend(*static, tensors, scales, call.masks, call.segment_ids))


@jitted(static=5)
def _attend(
    implementation: Implementation | None,
    config: Config,
    dtype: np.dtype,
    sharding: Any,
    with_lse: bool,
    tensors: Three,
    scales: Three,
    masks: Masks,
    segment_ids: SegmentIds | None,
) -> tuple[Array, ...]:
    tensors, scales = jax.tree.map(_guards.quantized, (tensors, scales))
    per_tensor, per_mask, results = _autodiff._letters(tensors, masks)
    per_scale = "b.n", "b.k", "b.k"

    def local(tensors: Three, scales: Three, masks: Masks, segment_ids: Any) -> tuple[Array, ...]:
        if not tensors[0].shape[2]:
            return without_heads(tensors[0], tensors[2].shape[3], dtype)
        if segment_ids is not None:
            masks = _mask.with_segments(masks, segment_ids, implementation)
        per_mask = _autodiff._letters(tensors, masks)[1]
        letters = per_tensor, per_scale, per_mask
        static = implementation, _ffi.fwd, _xla.attention, (config, dtype), letters, results
        return _dispatch.run(*static, tensors, scales, masks)

    per_id = None if segment_ids is None else ("b.", "b.")
    letters = per_tensor, per_scale, per_mask, per_id
    call = _sharding.over_named_axes(local, letters, results, sharding)
    out, lse = call(tensors, scales, masks, segment_ids)
    return (out, lse) if with_lse else (out,)
