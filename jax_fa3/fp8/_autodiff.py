"""The custom_vjp: forward in FP8, backward in 16 bit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from .. import _autodiff, _dispatch, _guards
from .._arguments import Implementation
from .._autodiff import RESIDUAL_NAMES
from .._jitted import finite_in_debug_mode
from .._problem import Config, Masks
from .._varying import vary_together
from . import _ffi, _quantize, _xla
from ._quantize import Quantization

Operands = tuple[Array, ...]  # query, key and value


class Preparation(NamedTuple):
    """The arrays by which query, key and value are quantized. A pytree."""

    signs: Array | None  # [1, H]
    tops: tuple[Array, Array, Array] | None = None  # _quantize.whole_top of each, for "tensor"


def differentiable(
    implementation: Implementation | None,
    quantization: Quantization,
    config: Config,
    operands: Operands,
    preparation: Preparation,
    masks: Masks,
) -> tuple[Array, Array]:
    """out [B, T, N, V] and lse [B, N, T], with first derivatives in reverse mode."""
    operands, preparation, masks = vary_together((operands, preparation, masks))
    operands = tuple(map(_guards.reverse_mode_only, operands))
    return _with_vjp(implementation, quantization, config, operands, preparation, masks)


def letters(
    operands: Operands, preparation: Preparation, masks: Masks
) -> tuple[tuple[Any, ...], tuple[str, str]]:
    """Of operands, preparation and masks; and of out and lse."""
    tensors, per_mask, results = _autodiff._letters(operands, masks)
    return (tensors, jax.tree.map(lambda x: "." * x.ndim, preparation), per_mask), results


def by_operand(
    operands: Operands, preparation: Preparation, masks: Masks
) -> list[tuple[Array, Array | None, Array | None, Array | None]]:
    """Of query, key and value each: the array, signs, lengths, top, as for _quantize.plain."""
    signs, tops = preparation
    lengths = masks.query_seq_lengths, masks.key_value_seq_lengths, masks.key_value_seq_lengths
    columns = operands, (signs, signs, None), lengths, tops or (None, None, None)
    return [*zip(*columns, strict=True)]


def _primal(
    implementation: Implementation | None,
    quantization: Quantization,
    config: Config,
    operands: Operands,
    preparation: Preparation,
    masks: Masks,
) -> tuple[Array, ...]:
    """out [B, T, N, V] and lse [B, N, T] of the kernels, or of plain JAX on other platforms."""
    per_operand, results = letters(operands, preparation, masks)
    static = implementation, _kernels, _plain, (quantization, config), per_operand, results
    return _dispatch.run(*static, operands, preparation, masks)


def _quantize_and_attend(
    quantize: Callable[..., tuple[Array, Array]],
    attend: Callable[..., tuple[Array, Array]],
    quantization: Quantization,
    config: Config,
    operands: Operands,
    preparation: Preparation,
    masks: Masks,
) -> tuple[Array, Array]:
    each = by_operand(operands, preparation, masks)
    pairs = [quantize(quantization, *arrays) for arrays in each]
    tensors, scales = zip(*pairs, strict=True)
    return attend(config, operands[0].dtype, tensors, scales, masks)


_kernels = functools.partial(_quantize_and_attend, _quantize.kernel, _ffi.fwd)
_plain = functools.partial(_quantize_and_attend, _quantize.plain, _xla.attention)


def _forward(
    implementation: Implementation | None,
    quantization: Quantization,
    config: Config,
    operands: Operands,
    preparation: Preparation,
    masks: Masks,
) -> tuple[tuple[Array, Array], Any]:
    constants = tuple(map(_guards.not_differentiable, operands))
    results = _primal(implementation, quantization, config, constants, preparation, masks)
    out, lse = map(checkpoint_name, results, RESIDUAL_NAMES)
    return (out, lse), (operands, masks, out, finite_in_debug_mode(lse))


def _backward(
    implementation: Implementation | None,
    quantization: Quantization,
    config: Config,
    residuals: tuple[Operands, Masks, Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Operands, None, None]:
    operands, masks, out, lse = residuals
    tensors, per_mask, results = _autodiff._letters(operands, masks)
    letters = tensors, per_mask, *results, *results
    functions = _autodiff._kernel_backward, _plain_backward
    static = implementation, *functions, (config, None), letters, tensors
    return _dispatch.run(*static, operands, masks, out, lse, *cotangents), None, None


def _plain_backward(
    config: Config, packed: None, operands: Operands, *others: Any
) -> tuple[Array, ...]:
    """With each row's sum of dout * out from the out of the forward, as the kernel has it: the weights
    of the backward do not add up to 1."""
    config = dataclasses.replace(config, partial=True)
    grads = _autodiff._plain_backward(config, packed, operands, *others)
    return tuple(dx.astype(x.dtype) for dx, x in zip(grads, operands, strict=True))


_with_vjp = jax.custom_vjp(_primal, nondiff_argnums=(0, 1, 2))
_with_vjp.defvjp(_forward, _backward)
