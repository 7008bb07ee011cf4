"""Attention of 16-bit arrays in FP8, with gradients in 16 bit."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from jax import Array, lax
from jax.typing import ArrayLike

from .. import _arguments, _dispatch, _mask, _sharding
from .._arguments import Implementation, Options
from .._autodiff import without_heads
from .._checks import refuse_dense
from .._jitted import jitted
from .._problem import Config, Masks, SegmentIds
from . import _autodiff
from ._autodiff import Operands, Preparation
from ._checks import check_not_quantized, config_of, refusal
from ._hadamard import check_head_dim, random_signs
from ._quantize import Quantization, check_quantization, whole_top


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    incoherent_key: ArrayLike | None = 0,
    quantization: Quantization = "block",
    return_residual: Literal[False] = False,
    **options: Unpack[Options],
) -> Array: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    incoherent_key: ArrayLike | None = 0,
    quantization: Quantization = "block",
    return_residual: Literal[True],
    **options: Unpack[Options],
) -> tuple[Array, Array]: ...


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    incoherent_key: ArrayLike | None = 0,
    quantization: Quantization = "block",
    **options: Any,
) -> Array | tuple[Array, Array]:
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
        options: the other arguments of jax_fa3.dot_product_attention, bias and mask excepted; scale is
            static.

    Returns as jax_fa3.dot_product_attention, the log-sum-exp in fp32.

    Gradients are those of 16-bit attention, as if nothing had been quantized, computed from query, key
    and value as they are with the forward's out and log-sum-exp: in reverse mode, of first order. Out
    and log-sum-exp have the names jax_fa3.RESIDUAL_NAMES for jax.checkpoint. A NaN or infinity reaches
    the whole block of 128 rows that has it, and every row that sees a key of that block; padding past
    the lengths may hold anything, and does not count in a scale.

    Raises:
        ValueError: as jax_fa3.dot_product_attention; head dims that the transform does not take.
        NotImplementedError: bias, mask, a traced scale; with "fa3", what the kernels do not support,
            and other devices.
    """
    refuse_dense(options, "jax_fa3.fp8")
    tensors, sizes, batched = _arguments.operands(query, key, value)
    call = _arguments.parse(sizes, batched, **options)
    check_not_quantized("query", tensors[0])
    check_quantization(quantization)
    signs = None
    if incoherent_key is not None:
        check_head_dim("query", sizes.head_dim, ", or incoherent_key=None")
        signs = random_signs(incoherent_key, sizes.head_dim)
    config = config_of(call, "query")
    refused = _dispatch.refusal(call, tensors[0].dtype) or refusal(call)
    implementation = _dispatch.choose(call.implementation, refused, stacklevel=2)
    static = implementation, quantization, config, call.sharding, call.return_residual
    return call.results(*_attend(*static, tensors, signs, call.masks, call.segment_ids))


@jitted(static=5)
def _attend(
    implementation: Implementation | None,
    quantization: Quantization,
    config: Config,
    sharding: Any,
    with_lse: bool,
    operands: Operands,
    signs: Array | None,
    masks: Masks,
    segment_ids: SegmentIds | None,
) -> tuple[Array, ...]:
    signs = None if signs is None else signs[None]
    preparation = Preparation(signs)
    if quantization == "tensor":  # of whole arrays: inside there are only parts of them
        each = _autodiff.by_operand(lax.stop_gradient(operands), preparation, masks)
        query, key, value = (whole_top(x, flips, lengths) for x, flips, lengths, _ in each)
        preparation = Preparation(signs, (query, key, value))

    def local(
        operands: Operands, preparation: Preparation, masks: Masks, segment_ids: Any
    ) -> tuple[Array, Array]:
        if not operands[0].shape[2]:
            return without_heads(operands[0], operands[2].shape[3])
        if segment_ids is not None:
            masks = _mask.with_segments(masks, segment_ids, implementation)
        static = implementation, quantization, config
        return _autodiff.differentiable(*static, operands, preparation, masks)

    per_id = None if segment_ids is None else ("b.", "b.")
    letters, results = _autodiff.letters(operands, preparation, masks)
    call = _sharding.over_named_axes(local, (*letters, per_id), results, sharding)
    out, lse = call(operands, preparation, masks, segment_ids)
    return (out, lse) if with_lse else (out,)
