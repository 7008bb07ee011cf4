"""Attention of 16-bit arrays in FP8, with gradients in 16 bit."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from jax import Array, lax
from jax.typing import ArrayLike

from .. import _arguments, _dispatch
from .._arguments import Options
from .._autodiff import on_each_device
from .._jitted import jitted
from .._operands import Call
from ._autodiff import Attention, Preparation, by_operand
from ._checks import check_not_quantized, refusal
from ._hadamard import check_head_dim, random_signs
from ._means import resolved
from ._quantize import Quantization, check_quantization, whole_top


# fmt: off
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, *, incoherent_key: ArrayLike | None = 0,
    quantization: Quantization = "block", smooth_k: bool | None = None, smooth_v: bool = True,
    return_residual: Literal[False] = False, **options: Unpack[Options],
) -> Array: ...
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, *, incoherent_key: ArrayLike | None = 0,
    quantization: Quantization = "block", smooth_k: bool | None = None, smooth_v: bool = True,
    return_residual: Literal[True], **options: Unpack[Options],
) -> tuple[Array, Array]: ...
# fmt: on


def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, *,
    incoherent_key: ArrayLike | None = 0, quantization: Quantization = "block",
    smooth_k: bool | None = None, smooth_v: bool = True, **options: Any,
) -> Array | tuple[Array, Array]:  # fmt: skip
    """jax_fa3.dot_product_attention, its forward computed in FP8 (e4m3).

    FlashAttention-3, block quantization and incoherent processing (arXiv 2407.08608, section 3.3):
    query and key go through `hadamard_transform`, which leaves their products as they are, all three
    through `quantize`, and the results to `quantized_dot_product_attention`.

    Args:
        query, key, value: as there, of 16 bits or more. The kernels take bfloat16 and float16, and
            H = V, a multiple of 16 from 64 to 256.
        incoherent_key: of the transform's signs, as for `random_signs`: an int, whose signs are the
            same in every call, or a key of jax.random. H must be a multiple of 16. None for no
            transform.
        quantization: which numbers share a scale: "block", each 128 rows of a head; "head", one head
            of one batch entry; "tensor", the whole array.
        smooth_k: whether `token_mean` of each key head is subtracted from its keys before they are
            quantized, as in SageAttention (arXiv 2410.02367): scores change by a constant of their row,
            which the log-sum-exp gets back. None: unless there is a soft cap, which is not linear, or sinks,
            which do not have the constant.
        smooth_v: the same of values; it is added to the result, for softmax's weights add up to 1.
        options: the other arguments of jax_fa3.dot_product_attention, but bias, mask, several intervals a
            row, alibi_slopes, relative_bias and dropout, none of which it takes; scale is static.

    Returns as jax_fa3.dot_product_attention, the log-sum-exp in fp32.

    Gradients are those of 16-bit attention of query, key and value as the forward rounded them, with its
    out and log-sum-exp, as if rounding had the derivative 1: in reverse mode, of first order. (Of the
    arrays as they were, weights would not add up to 1.) Out and log-sum-exp have the names
    jax_fa3.RESIDUAL_NAMES, and checkpoint_name, for jax.checkpoint. A
    NaN or infinity reaches the whole block of 128 rows that has it, and every row that sees a key of
    that block; padding past the lengths may hold anything, and does not count in a scale or a mean.

    Raises:
        ValueError: as jax_fa3.dot_product_attention; head dims that the transform does not take;
            smooth_k with a soft cap or sinks.
        NotImplementedError: what it does not take (above), a traced scale; with "fa3", what the kernels
            do not support, and other devices.
    """
    call = _arguments.parse_without_dense("jax_fa3.fp8", query, key, value, **options)
    check_not_quantized("query", call.operands.query)
    check_quantization(quantization)
    fixed = call.config.logits_soft_cap is not None or call.operands.sinks is not None
    smooth = resolved(smooth_k, smooth_v, fixed)
    signs = None
    if incoherent_key is not None:
        head_dim = call.operands.sizes.head_dim
        check_head_dim("query", head_dim, ", or incoherent_key=None")
        signs = random_signs(incoherent_key, head_dim)
    refused = _dispatch.refusal(call) or refusal(call)
    implementation = _dispatch.choose(call.implementation, refused, stacklevel=2)
    return _attend(Attention(implementation, call.config, quantization, smooth), call, signs)


@jitted(static=1)
def _attend(method: Attention, call: Call, signs: Array | None) -> Any:
    preparation = Preparation(None if signs is None else signs[None])
    if method.quantization == "tensor":  # of whole arrays: each device has only a part of them
        whole = by_operand(lax.stop_gradient(call.operands), preparation, call.masks, method.smooth)
        query, key, value = map(whole_top, whole)
        preparation = preparation._replace(tops=(query, key, value))
    return on_each_device(method, call, preparation)
