"""A step of the ring: attention to one part of the keys, joined with that to the parts before."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from .. import _autodiff, _dispatch, _ffi, _xla
from .._arguments import Implementation
from .._problem import Config, Masks
from .._varying import vary_together
from ._merge import merge
from ._words import from_words

# Query, and a part of key and value, side by side: [B, S, K, H + V].
Operands = tuple[Array, Array]


def forward(
    implementation: Implementation | None,
    config: Config,
    operands: Operands,
    masks: Masks,
    before: tuple[Array, Array] | None,
) -> tuple[Array, ...]:
    """out [B, T, N, V] and lse [B, N, T], of this part and those before; out is fp32 if
    config.partial, else in query's dtype.

    Args:
        before: those of the steps before, fp32.
    """
    tensors, per_mask, results = _letters(operands, masks)
    letters = tensors, per_mask, None if before is None else results
    static = implementation, _forward_kernel, _plain_forward, (config,), letters, results
    return _dispatch.run(*static, operands, masks, before)


def _forward_kernel(
    config: Config, operands: Operands, masks: Masks, before: tuple[Array, Array] | None
) -> tuple[Array, ...]:
    query, part = operands
    return _ffi.fwd(config, query, part, None, masks, before=before)


def _plain_forward(
    config: Config, operands: Operands, masks: Masks, before: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    query, part = operands
    key, value = jnp.split(part, [query.shape[-1]], axis=-1)
    options: Any = {"scale": config.scale, "logits_soft_cap": config.logits_soft_cap}
    options |= {"partial": config.partial or before is not None}
    found = _xla.attention(query, key, value, masks, config.window, **options)
    if before is not None:
        parts = ((out, jnp.swapaxes(lse, 1, 2)) for out, lse in (before, found))
        out, lse = merge(*zip(*parts, strict=True))
        found = out if config.partial else out.astype(query.dtype), jnp.swapaxes(lse, 1, 2)
    return found


def backward(
    implementation: Implementation | None,
    config: Config,
    finish_dq: bool,
    operands: Operands,
    masks: Masks,
    lse: Array,
    dout: Array,
    dlse: Array,
    summed_dq: Array | None,
) -> tuple[Array, ...]:
    """dq, of this part and those before, in query's dtype; dk and dv of this part, fp32.

    Args:
        operands: the part in words, of which there may be more behind it.
        finish_dq: False for a sum of dq for the next step, in the order of _ffi.dq_sum_of.
        lse, dout: of all keys.
        dlse: the cotangent of lse minus rowsum(dout * out).
        summed_dq: that of the steps before.
    """
    tensors, per_mask, (rows, per_row) = _letters(operands, masks)
    summed = "bn.."
    letters = tensors, per_mask, per_row, rows, per_row, None if summed_dq is None else summed
    results = rows if finish_dq else summed, tensors[1], tensors[1]
    functions = _backward_kernel, _plain_backward
    static = implementation, *functions, (config, finish_dq), letters, results
    return _dispatch.run(*static, operands, masks, lse, dout, dlse, summed_dq)


def _backward_kernel(
    config: Config,
    finish_dq: bool,
    operands: Operands,
    masks: Masks,
    lse: Array,
    dout: Array,
    dlse: Array,
    summed_dq: Array | None,
) -> tuple[Array, ...]:
    query, part = operands
    rows, of_dq = _ffi.Rows(None, lse, dout, dlse), _ffi.PartOfDq(summed_dq, finish_dq)
    return _ffi.bwd(config, query, part, None, masks, rows, part=of_dq)


def _plain_backward(
    config: Config,
    finish_dq: bool,
    operands: Operands,
    masks: Masks,
    lse: Array,
    dout: Array,
    dlse: Array,
    summed_dq: Array | None,
) -> tuple[Array, ...]:
    """The sum of dq is [B, N, T, H] here, filled up with zeros."""
    query, part = operands
    head_dim, head_dim_v = query.shape[-1], dout.shape[-1]
    part = from_words(part, query.dtype, head_dim + head_dim_v)
    key, value = jnp.split(part, [head_dim], axis=-1)
    dq, dk, dv = _xla.backward(config, query, key, value, masks, lse, dout, dlse)
    if summed_dq is not None:
        dq += jnp.swapaxes(summed_dq[:, :, : dq.shape[1], : dq.shape[3]], 1, 2)
    if finish_dq:
        dq = dq.astype(query.dtype)
    else:
        shape = _ffi.dq_sum_of(query, query.shape[2], head_dim_v).shape
        dq = jnp.swapaxes(dq, 1, 2)
        dq = jnp.pad(dq, [(0, n - m) for n, m in zip(shape, dq.shape, strict=True)])
    return vary_together(((dq, dk, dv), operands))[0]  # without elements they are constants


def _letters(operands: Operands, masks: Masks) -> tuple[tuple[str, str], Any, tuple[str, str]]:
    """Of operands and masks; and of out and lse."""
    query, part = operands
    (rows, keys, _), per_mask, results = _autodiff._letters((query, part, part), masks)
    return (rows, keys), per_mask, results
