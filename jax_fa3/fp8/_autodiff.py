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
from .._plain import backward_by_rows
from .._problem import Config, Masks
from . import _ffi, _quantize, _xla
from ._means import log_sum_exp, mean_of, means_of
from ._quantize import Quantization, Unquantized


class Preparation(NamedTuple):
    """The arrays by which query, key and value are quantized. A pytree."""

    signs: Array | None  # [1, H]
    tops: tuple[Array, Array, Array] | None = None  # _quantize.whole_top of each, for "tensor"


@dataclasses.dataclass(frozen=True)
class Attention(_autodiff.Method):
    """Of 16-bit arrays in FP8; `more` is a Preparation."""

    quantization: Quantization
    smooth: tuple[bool, bool]  # whether key's and value's means are taken out

    def letters(self, more: Preparation) -> Any:
        return jax.tree.map(lambda x: "." * x.ndim, more)

    def forward(
        self, operands: Operands, masks: Masks, more: Preparation, for_gradient: bool
    ) -> tuple[Array, ...]:
        per_mask = batch_letters(masks, operands.sizes.batch)
        letters = operands.letters, self.letters(more), per_mask
        functions, static = (_kernels, _plain), (self.quantization, self.smooth, self.config)
        results = operands.result_letters
        call = self.implementation, *functions, static, letters, results
        return _dispatch.run(*call, operands, more, masks)

    def backward(self, operands: Operands, masks: Masks, rows: Rows) -> Operands:
        return _autodiff.backward(self, backward_by_rows, operands, masks, rows)


def by_operand(
    operands: Operands, preparation: Preparation, masks: Masks, smooth: tuple[bool, bool]
) -> tuple[Unquantized, Unquantized, Unquantized]:
    """Of query, key and value each."""
    query, key, value = operands.split()
    signs, tops = preparation.signs, preparation.tops or (None, None, None)
    key_lengths = masks.key_value_seq_lengths
    if all(smooth):
        key_mean, value_mean = means_of(key, value, key_lengths)
    else:
        key_mean, value_mean = (
            mean_of(x, key_lengths) if wanted else None
            for x, wanted in zip((key, value), smooth, strict=True)
        )
    return (
        Unquantized(query, signs, masks.query_seq_lengths, tops[0]),
        Unquantized(key, signs, key_lengths, tops[1], key_mean),
        Unquantized(value, None, key_lengths, tops[2], value_mean),
    )


def _quantize_and_attend(
    quantize: Callable[..., tuple[Array, Array]],
    attend: Callable[..., tuple[Array, Array]],
    quantization: Quantization,
    smooth: tuple[bool, bool],
    config: Config,
    operands: Operands,
    preparation: Preparation,
    masks: Masks,
) -> tuple[Array, Array]:
    query, key, value = by_operand(operands, preparation, masks, smooth)
    # Where XLA quantizes, for coarser scales are not the kernel's, it is slower to transpose.
    transposed = quantize is _quantize.kernel and quantization == "block"
    each = (query, False), (key, False), (value, transposed)
    tensors, scales = zip(*(quantize(quantization, how, x) for x, how in each), strict=True)
    if transposed:
        tensors = *tensors[:2], _ffi.Transposed(tensors[2])
    out, lse = attend(config, query.x.dtype, tensors, scales, masks, value.mean, operands.sinks)
    return out, lse if key.mean is None else log_sum_exp(lse, config, query.x, key.mean)


_kernels = functools.partial(_quantize_and_attend, _quantize.kernel, _ffi.fwd)
_plain = functools.partial(_quantize_and_attend, _quantize.plain, _xla.attention)
