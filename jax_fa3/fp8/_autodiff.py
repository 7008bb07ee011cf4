"""Forward in FP8, backward in 16 bit, of the numbers that the forward saw: query, key and value as they
were rounded. With others its weights, which go by the forward's log-sum-exp, would not add up to 1, and
neither would a row's gradients of scores to 0: where scores are large, training diverges."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _autodiff, _dispatch
from .._operands import Operands, Rows, batch_letters
from .._plain import backward_by_rows
from .._problem import Config, Masks
from . import _ffi, _quantize, _xla
from ._ffi import Unquantized
from ._hadamard import undone
from ._means import by_query_head, mean_of, means_of, shift, shifted
from ._quantize import Quantization


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

    def gradient(self, operands: Operands, masks: Masks, more: Preparation, rows: Rows) -> Operands:
        per_mask = batch_letters(masks, operands.sizes.batch)
        letters = operands.letters, self.letters(more), per_mask
        three: Any = operands.letters
        results = three.query, three.key, three.value, "bk.", operands.result_letters[1]
        functions = _seen_by_kernels, _seen_by_plain
        call = self.implementation, *functions, (self,), letters, results
        query, key, value, mean, by = _dispatch.run(*call, operands, more, masks)
        seen = dataclasses.replace(operands, query=query, key=key, value=value)
        rows = rows._replace(lse=shifted(rows.lse, -by))
        found = _autodiff.backward(self, backward_by_rows, seen, masks, rows)
        if not self.smooth[0]:
            return found
        # The log-sum-exp that was given out has the part of key's mean, too, but for empty rows.
        dlse = jnp.where(rows.lse == -jnp.inf, 0, rows.whole_dlse())
        dlse = jnp.swapaxes(dlse, 1, 2)[..., None]
        of_mean = self.config.scale * dlse * by_query_head(mean, query.shape[2])[:, None]
        dquery = found.query.astype(jnp.float32) + of_mean
        return dataclasses.replace(found, query=dquery.astype(query.dtype))


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
    quantize = _by_scales(quantize, quantization)
    transposed = quantize is _ffi.quantize  # XLA is slower to transpose than the attention's kernel
    each = (False, query), (False, key), (transposed, value)
    tensors, scales = zip(*(quantize(*x) for x in each), strict=True)
    if transposed:
        tensors = *tensors[:2], _ffi.Transposed(tensors[2])
    out, lse = attend(config, query.x.dtype, tensors, scales, masks, value.mean, operands.sinks)
    if key.mean is not None:
        lse = shifted(lse, shift(config, query.x, key.mean))
    return out, lse


def _by_scales(
    quantize: Callable[..., tuple[Array, Array]], quantization: Quantization
) -> Callable[..., tuple[Array, Array]]:
    """`quantize`, or plain JAX for scales coarser than the kernel's."""
    if quantization == "block":
        return quantize
    return functools.partial(_quantize.plain, quantization=quantization)


def _seen(
    quantize: Any, method: Attention, operands: Operands, preparation: Preparation, masks: Masks
) -> tuple[Array, ...]:
    """query, key and value as the forward rounded them, in their dtype, key without its mean; that mean,
    [B, K, H]; and by how much it raises the log-sum-exp, [B, N, T]."""
    quantize = _by_scales(quantize, method.quantization)
    each = by_operand(operands, preparation, masks, method.smooth)
    found = []
    for given in each:
        x8, scales = quantize(False, given)
        rows = jnp.repeat(scales, _ffi.BLOCK, axis=1)[:, : x8.shape[1], :, None]
        if given.signs is None:
            x = x8.astype(jnp.float32) * rows
        else:
            x = undone(x8, given.signs[:, None, None]) * rows
        found.append(x)
    query, key, value = each
    if value.mean is not None:
        found[2] += value.mean[:, None]
    found = [x.astype(given.x.dtype) for x, given in zip(found, each, strict=True)]
    batch, length, heads, head_dim = query.x.shape
    if key.mean is None:
        mean = jnp.zeros((batch, key.x.shape[2], head_dim), jnp.float32)
        return *found, mean, jnp.zeros((batch, heads, length), jnp.float32)
    return *found, key.mean, shift(method.config, query.x, key.mean)


_kernels = functools.partial(_quantize_and_attend, _ffi.quantize, _ffi.fwd)
_plain = functools.partial(_quantize_and_attend, _quantize.plain, _xla.attention)
_seen_by_kernels = functools.partial(_seen, _ffi.quantize)
_seen_by_plain = functools.partial(_seen, _quantize.plain)
