"""A step of the ring: attention to one part of the keys, joined with that to the parts before."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import Array

from .. import _dispatch, _ffi, _xla
from .._operands import Operands, Rows, batch_letters
from .._problem import Config, Implementation, Masks
from .._varying import vary_together
from ._merge import merge
from ._words import from_words

Before = tuple[Array, Array] | None  # out and lse of the steps before, fp32


def forward(
    implementation: Implementation | None,
    config: Config,
    operands: Operands,
    masks: Masks,
    before: Before,
) -> tuple[Array, ...]:
    """out [B, T, N, V] and lse [B, N, T], of this part and those before; out is fp32 if
    config.partial, else in query's dtype.

    Args:
        operands: query, and a part of key and value side by side.
    """
    results = operands.result_letters
    per_mask = batch_letters(masks, operands.query.shape[0])
    letters = operands.letters, per_mask, None if before is None else results
    static = implementation, _ffi.fwd, _plain_forward, (config,), letters, results
    return _dispatch.run(*static, operands, masks, before)


def _plain_forward(
    config: Config, operands: Operands, masks: Masks, before: Before
) -> tuple[Array, Array]:
    if before is None:
        return _xla.attention(config, operands, masks)
    found = _xla.attention(dataclasses.replace(config, partial=True), operands, masks)
    parts = ((out, jnp.swapaxes(lse, 1, 2)) for out, lse in (before, found))
    out, lse = merge(*zip(*parts, strict=True))
    return out if config.partial else out.astype(operands.query.dtype), jnp.swapaxes(lse, 1, 2)


def backward(
    implementation: Implementation | None,
    config: Config,
    operands: Operands,
    masks: Masks,
    rows: Rows,
    summed_dq: Array | None,
    finish_dq: bool,
) -> tuple[Array, ...]:
    """dq, of this part and those before, in query's dtype; dk and dv of this part, fp32.

    Args:
        operands: query, and a part of key and value in words, of which there may be more behind it.
        rows: of all keys; without out.
        summed_dq: that of the steps before.
        finish_dq: False for a sum of dq for the next step, in the order of _ffi.dq_sum_of.
    """
    dq, keys, dq_sums = operands.result_letters[0], operands.letters.key, "bn.."
    per_mask = batch_letters(masks, operands.query.shape[0])
    sums = None if summed_dq is None else dq_sums
    letters = operands.letters, per_mask, rows.letters(operands), sums
    functions = (_ffi.bwd, _plain_backward) if finish_dq else _UNFINISHED
    results = dq if finish_dq else dq_sums, keys, keys
    static = implementation, *functions, (config,), letters, results
    return _dispatch.run(*static, operands, masks, rows, summed_dq)


def _plain_backward(
    config: Config,
    operands: Operands,
    masks: Masks,
    rows: Rows,
    summed_dq: Array | None,
    finish_dq: bool = True,
) -> tuple[Array, ...]:
    """The sum of dq is [B, N, T, H] here, filled up with zeros."""
    assert operands.key is not None
    query, head_dim_v = operands.query, rows.dout.shape[-1]
    part = from_words(operands.key, query.dtype, query.shape[-1] + head_dim_v)
    dq, dk, dv = _xla.backward(config, Operands(query, part), masks, rows)
    if summed_dq is not None:
        dq += jnp.swapaxes(summed_dq[:, :, : dq.shape[1], : dq.shape[3]], 1, 2)
    if finish_dq:
        dq = dq.astype(query.dtype)
    else:
        shape = _ffi.dq_sum_of(query, query.shape[2], head_dim_v).shape
        dq = jnp.swapaxes(dq, 1, 2)
        dq = jnp.pad(dq, [(0, n - m) for n, m in zip(shape, dq.shape, strict=True)])
    return vary_together(((dq, dk, dv), operands))[0]  # without elements they are constants


_UNFINISHED = tuple(functools.partial(f, finish_dq=False) for f in (_ffi.bwd, _plain_backward))
