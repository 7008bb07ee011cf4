"""Attention in plain JAX: every platform, every float dtype, every order of derivative.

Blocks of query rows run one after the other, each over all keys, and are computed again for the
derivative, so memory is linear in T and in S. Simple beats fast here: keys that a whole block does
not see are computed and masked all the same.

In this file a tensor per query row has the shape [B, K, G, T, ...], with N = K * G; inside a block
[B, K, G, R, ...], R rows of the T.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _alibi, _bias, _dropout, _mask_bits, _relative_bias
from ._broken import nan_rows, row_sums, touched
from ._mask import row_intervals
from ._problem import wide
from ._row_blocks import join, rows_per_block, split

if TYPE_CHECKING:
    from ._operands import Operands, Rows
    from ._problem import Config, Masks


def attention(config: Config, operands: Operands, masks: Masks) -> tuple[Array, Array]:
    """Attention with memory linear in T and S (beside a dense bias or mask that is passed in).

    Args:
        config: scale may have any sign; logits_soft_cap comes after scale, and before the terms that are
            added or behind them.
        operands: of any float dtype, with dropout's words if config has dropout; scale takes the place
            of config's; a bias of -inf (of _bias.LEAST or less) and a mask of False hide a key; sinks,
            slopes and relative_bias are fp32, or fp64 for fp64 inputs.

    Returns:
        out: [B, T, N, V] in query's dtype, or lse's if config.partial.
        lse: [B, N, T], fp32, or fp64 for fp64 inputs.
    """
    query, key, value = operands.split()
    scale = config.scale if operands.scale is None else operands.scale
    batch, length, heads, _ = query.shape
    intervals = row_intervals(masks, config.window, batch, length, key.shape[1])
    groups, narrow, einsum = _groups(query, key), query.dtype, _einsum_for(query.dtype)
    cap = config.logits_soft_cap
    query, key, value = _widened(query, key, value, masks)
    dense = {
        name: x.reshape(x.shape[0], *((1, 1) if x.shape[1] == 1 else groups), *x.shape[2:])
        for name, x in (("bias", operands.bias), ("mask", operands.mask))
        if x is not None
    }
    sinks, slopes = (
        None if x is None else x.reshape(-1, *groups, 1, 1)
        for x in (operands.sinks, operands.alibi_slopes)
    )
    table = operands.relative_bias
    table = None if table is None else table.reshape(table.shape[0], *groups, table.shape[2])
    words = None if operands.dropout is None else operands.dropout.reshape(batch, *groups, 2)

    def block(rows: tuple[Any, ...]) -> tuple[Array, Array]:
        query, begin, end, broken, numbers, dense_rows = rows
        tensors = dense | dense_rows
        query = jnp.where(((begin < end) | broken)[..., None], query, 0)
        scores = _scores(einsum, query, key, scale, None if config.soft_cap_last else cap)
        visible = _visible(begin, end, key.shape[1])
        if slopes is not None:
            scores += _alibi.term(slopes, numbers, key.shape[1])
        if table is not None:
            scores += _relative_bias.term(table, numbers.reshape(-1), key.shape[1], length)
        if "bias" in tensors:
            scores += tensors["bias"].astype(scores.dtype)
            visible &= ~(tensors["bias"].astype(scores.dtype) <= _bias.LEAST)  # NaN stays NaN
        if "mask" in tensors:
            visible &= _mask_bits.as_bool(tensors["mask"], key.shape[1])
        if config.soft_cap_last:  # a bias may be NaN where it is padding, and so would be its slope
            scores = _capped(jnp.where(visible, scores, 0), cap)

        sees = visible.any(-1, keepdims=True)  # not top > -inf: a NaN that is seen stays a NaN
        top = jnp.max(scores, -1, keepdims=True, initial=-jnp.inf, where=visible)
        top = top if sinks is None else jnp.maximum(top, sinks)
        top = lax.stop_gradient(jnp.where(sees, top, 0))
        weights = jnp.exp(jnp.where(visible, scores - top, -jnp.inf))
        total = weights.sum(-1, keepdims=True)
        total += 0 if sinks is None else jnp.exp(jnp.where(sees, sinks - top, 0))
        total = jnp.where(sees, total, 1)
        if words is not None:
            kept = _dropout.kept(words, config.dropout, numbers.reshape(-1), key.shape[1])
            weights = jnp.where(kept, weights, 0) * _dropout.scale(config.dropout)
        out = einsum("bkgrs,bskv->bkgrv", weights, value) / total
        lse = top + jnp.log(total)
        nothing, nan = nan_rows(broken[..., None], query, value.shape[-1])
        out = jnp.where(sees, out, nothing)
        lse = jnp.where(sees, lse, jnp.where(broken[..., None], nan, -jnp.inf))
        return out if config.partial else out.astype(narrow), lse[..., 0]

    by_row = {name: x for name, x in dense.items() if x.shape[3] == length}
    numbers = jnp.arange(length, dtype=jnp.int32).reshape(1, 1, 1, length)
    each = (_heads_first(query, groups), *(x[:, None, None] for x in intervals), numbers, by_row)
    rows = split(each, rows_per_block(query, key))
    out, lse = join(lax.map(jax.checkpoint(block, prevent_cse=False), rows), length)
    return _heads_last(out), lse.reshape(batch, heads, length)


def backward(
    config: Config, operands: Operands, masks: Masks, rows: Rows
) -> tuple[Array, Array, Array]:
    """Gradients from the forward's log-sum-exp, as in FlashAttention-2 (Dao 2023), algorithm 2.

    Args:
        config, operands, masks: the forward's arguments.
        rows: out is used if config.partial.

    Returns:
        dq, dk, dv, in the shapes of query, key, value and their dtypes, or lse's if config.partial.
        The dq of a row whose segment is broken is NaN, or 0 if its cotangents are.
    """
    query, key, value = operands.split()
    batch, length, _, _ = query.shape
    intervals = row_intervals(masks, config.window, batch, length, key.shape[1])
    dlse = rows.whole_dlse()
    groups, cap, einsum = _groups(query, key), config.logits_soft_cap, _einsum_for(query.dtype)
    narrow = query.dtype, key.dtype, value.dtype
    query, key, value = _widened(query, key, value, masks)
    if config.partial:
        narrow = (query.dtype,) * 3
    if config.partial and rows.out is not None:
        dlse -= row_sums(rows.dout, rows.out, query.dtype)

    def block(sums: tuple[Array, Array], rows: tuple[Array, ...]) -> tuple[Any, Array]:
        query, dout, lse, dlse, begin, end, broken = rows
        sees, broken = begin < end, broken & touched(dout, dlse)
        query, dout = (jnp.where(sees[..., None], x, 0) for x in (query, dout))
        dout = dout.astype(query.dtype)
        lse, dlse = (jnp.where(sees, x, 0) for x in (lse, dlse))
        visible = _visible(begin, end, key.shape[1])
        scores = _scores(einsum, query, key, config.scale, cap)
        offset = lse[..., None]
        if not config.partial:  # all keys are here: what lse lost to its rounding need not count
            offset = jnp.max(scores, -1, keepdims=True, initial=-jnp.inf, where=visible)
            offset = jnp.where(sees[..., None], offset, 0)
        weights = jnp.exp(jnp.where(visible, scores - offset, -jnp.inf))
        if not config.partial:
            weights /= jnp.where(sees[..., None], weights.sum(-1, keepdims=True), 1)
        dweights = einsum("bkgrv,bskv->bkgrs", dout, value)
        # dlse enters as one more term: d lse / d score is the probability itself. So does the row's
        # sum of dout * out, from its own weights if they are all here: out is rounded.
        if not config.partial:
            dlse -= (weights * dweights).sum(-1)
        dscores = jnp.where(visible, weights * (dweights + dlse[..., None]), 0)
        if cap is not None:
            dscores *= 1 - jnp.square(scores / cap)
        dscores *= config.scale
        dq = einsum("bkgrs,bskh->bkgrh", dscores, key)
        dk = einsum("bkgrs,bkgrh->bskh", dscores, query)
        dv = einsum("bkgrs,bkgrv->bskv", weights, dout)
        dq = jnp.where(broken[..., None], jnp.nan, dq).astype(narrow[0])
        return (sums[0] + dk, sums[1] + dv), dq

    each = (
        *(_heads_first(x, groups) for x in (query, rows.dout)),
        *(x.reshape(batch, *groups, length) for x in (rows.lse, dlse)),
        *(x[:, None, None] for x in intervals),
    )
    sums = jnp.zeros_like(key), jnp.zeros_like(value)
    (dk, dv), dq = lax.scan(block, sums, split(each, rows_per_block(query, key)))
    return _heads_last(join(dq, length)), dk.astype(narrow[1]), dv.astype(narrow[2])


def _widened(query: Array, key: Array, value: Array, masks: Masks) -> list[Array]:
    """The operands in fp32 (fp64), in which everything is computed and summed; zeros in the keys
    past their length, because 0 * NaN is NaN: masking the scores is not enough."""
    if masks.key_value_seq_lengths is not None:
        keys = jnp.arange(key.shape[1], dtype=jnp.int32)[None]
        inside = keys < masks.key_value_seq_lengths[:, None]
        key, value = (jnp.where(inside[..., None, None], x, 0) for x in (key, value))
    return [x.astype(wide(x.dtype)) for x in (query, key, value)]


def _einsum_for(dtype: jnp.dtype) -> Callable[..., Array]:
    """Products of widened operands. GPUs multiply fp32 as TF32 by default, which rounds to as few
    bits as fp16 has: too few for the steps in between of fp16 inputs."""
    return functools.partial(jnp.einsum, precision="highest" if dtype == jnp.float16 else None)


def _scores(
    einsum: Callable[..., Array],
    query: Array,
    key: Array,
    scale: float | Array,
    soft_cap: float | None,
) -> Array:
    """[B, K, G, R, S], fp32 or fp64."""
    scores = einsum("bkgrh,bskh->bkgrs", query, key) * jnp.asarray(scale, query.dtype)
    return _capped(scores, soft_cap)


def _capped(scores: Array, soft_cap: float | None) -> Array:
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _visible(begin: Array, end: Array, key_length: int) -> Array:
    """bool [B, 1, 1, R, S]."""
    keys = jnp.arange(key_length, dtype=jnp.int32).reshape(*[1] * begin.ndim, key_length)
    return (begin[..., None] <= keys) & (keys < end[..., None])


def _groups(query: Array, key: Array) -> tuple[int, int]:
    """(K, G)."""
    return key.shape[2], query.shape[2] // max(key.shape[2], 1)


def _heads_first(x: Array, groups: tuple[int, int]) -> Array:
    """[B, T, N, ...] to [B, K, G, T, ...]."""
    return x.reshape(*x.shape[:2], *groups, x.shape[3]).transpose(0, 2, 3, 1, 4)


def _heads_last(x: Array) -> Array:
    """[B, K, G, T, V] to [B, T, N, V]."""
    batch, groups, group, length, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * group, dim)
