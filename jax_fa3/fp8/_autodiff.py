"""Forward in FP8, backward in 16 bit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from .. import _autodiff, _dispatch
from .._operands import Operands, Rows, batch_letters
from .._problem import Config, Masks
from . import _ffi, _quantize, _xla
from ._quantize import Quantization, Unquantized


class Preparation(NamedTuple):
    """The arrays by which query, key and value are quantized. A pytree."""

    signs: Array | None  # [1, H]
    tops: tuple[Array, Array, Array] | None = None  # _quantize.whole_top of each, for "tensor"


@dataclasses.dataclass(frozen=True)
class Attention(_autodiff.Method):
    """Of 16-bit arrays in FP8; `more` is a Preparation."""

    quantization: Quantization

    def letters(self, more: Preparation) -> Any:
        return jax.tree.map(lambda x: "." * x.ndim, more)

    def forward(
        self, operands: Operands, masks: Masks, more: Preparation, for_gradient: bool
    ) -> tuple[Array, ...]:
        per_mask = batch_letters(masks, operands.sizes.batch)
        letters = operands.letters, self.letters(more), per_mask
        functions, static = (_kernels, _plain), (self.quantization, self.config)
        results = operands.result_letters
        call = self.implementation, *functions, static, letters, results
        return _dispatch.run(*call, operands, more, masks)

    def backward(self, operands: Operands, masks: Masks, rows: Rows) -> Operands:
        return _autodiff.backward(self, _autodiff.plain_backward_by_rows, operands, masks, rows)


def by_operand(
    operands: Operands, preparation: Preparation, masks: Masks
) -> tuple[Unquantized, Unquantized, Unquantized]:
    """Of query, key and value each."""
    query, key, value = operands.split()
    signs, tops = preparation.signs, preparation.tops or (None, None, None)
    key_lengths = masks.key_value_seq_lengths
    return (
        Unquantized(query, signs, masks.query_seq_lengths, tops[0]),
        Unquantized(key, signs, key_lengths, tops[1]),
        Unquantized(value, None, key_lengths, tops[2]),
    )


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
    tensors, scales = zip(*(quantize(quantization, x) for x in each), strict=True)
    return attend(config, operands.query.dtype, tensors, scales, masks, operands.sinks)


_kernels = functools.partial(_quantize_and_attend, _quantize.kernel, _ffi.fwd)
_plain = functools.partial(_quantize_and_attend, _quantize.plain, _xla.attention)
