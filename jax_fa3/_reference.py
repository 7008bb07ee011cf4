"""What attention means here, written to be read: dense, slow, the oracle of every test.

The mask arguments must be concrete (Python or NumPy values): who sees whom is decided in NumPy's
64-bit integers and Python's unbounded ones, so that it is exact for any value.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from ._bias import LEAST
from ._broken import BROKEN_BEGIN, BROKEN_END, nan_rows


class Masks(NamedTuple):
    """The public functions' arguments of these names."""

    is_causal: bool = False
    local_window_size: int | tuple[int, int] | None = None
    query_offset: Any = 0
    query_seq_lengths: Any = None
    key_value_seq_lengths: Any = None
    query_segment_ids: Any = None
    key_value_segment_ids: Any = None
    key_begin: Any = None
    key_end: Any = None


def visible_keys(
    batch: int, query_length: int, key_length: int, **mask_arguments: Any
) -> tuple[np.ndarray, np.ndarray]:
    """visible: bool [B, T, S], row i sees key j; broken: bool [B, T], the row's segment is broken."""
    masks = Masks(**mask_arguments)
    key_begin, key_end, window = masks.key_begin, masks.key_end, masks.local_window_size
    i, j = np.arange(query_length)[:, None], np.arange(key_length)  # [T, 1], [S]
    visible = np.ones((batch, query_length, key_length), bool)
    broken = np.zeros((batch, query_length), bool)
    # object: Python's integers
    offset = np.reshape(np.asarray(masks.query_offset, object), (-1, 1, 1))
    if all(abs(x) < 2**60 for x in offset.flat):
        offset = offset.astype(np.int64)  # as exact, and fast
    ahead = (j - i) - offset  # distance of a key from its row's diagonal, [1 or B, T, S]
    if masks.is_causal:
        visible &= (ahead <= 0).astype(bool)
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        visible &= (ahead >= -left).astype(bool) & (ahead <= right).astype(bool)
    if masks.key_value_seq_lengths is not None:
        visible &= j < np.reshape(masks.key_value_seq_lengths, (-1, 1, 1))
    several = np.ndim(key_begin) == 3  # [B, T, M], of a call with a batch axis
    if several:
        begin, end = (np.asarray(x)[..., None] for x in (key_begin, key_end))
        visible &= ((j >= begin) & (j < end)).any(2)
        key_begin = key_end = None
    if key_begin is not None:
        visible &= j >= np.asarray(key_begin)[..., None]
    if key_end is not None:
        visible &= j < np.asarray(key_end)[..., None]
    if key_begin is not None and key_end is not None:  # what key_intervals says of broken rows
        broken |= (np.asarray(key_begin) == BROKEN_BEGIN) & (np.asarray(key_end) == BROKEN_END)
    if masks.query_segment_ids is not None:
        ids = np.broadcast_to(masks.query_segment_ids, (batch, query_length))[..., None]
        same = (ids == np.asarray(masks.key_value_segment_ids)[..., None, :]) & (ids >= 0)
        # A segment is one run when its last key is as far from its first as it has keys.
        last = np.where(same, j, -1).max(-1, initial=-1)
        first = np.where(same, j, key_length).min(-1, initial=key_length)
        broken |= same.any(-1) & (last - first + 1 != same.sum(-1))
        visible &= same & ~broken[..., None]
    if masks.query_seq_lengths is not None:
        inside = i < np.reshape(masks.query_seq_lengths, (-1, 1, 1))  # [B, T, 1]
        visible, broken = visible & inside, broken & inside[..., 0]
    return visible, broken


def products(query: Array, key: Array) -> Array:
    """[B, N, T, S] of [B, T, N, H] and [B, S, N, H]."""
    return jnp.einsum("btnh,bsnh->bnts", query, key)


def weighted(weights: Array, value: Array) -> Array:
    """[B, N, T, V] of [B, N, T, S] and [B, S, N, V]."""
    return jnp.einsum("bnts,bsnv->bntv", weights, value)


def row_sums(weights: Array) -> Array:
    """[B, N, T, 1] of [B, N, T, S]."""
    return weights.sum(-1, keepdims=True)


class Rounding(NamedTuple):
    """What a kernel rounds, for the tolerance rule."""

    scores: Callable[[Array], Array]
    probabilities: Callable[[Array, Array], Array]  # from exp(score - row's top) and their sum
    out: Callable[[Array], Array]
    products: Callable[[Array, Array], Array] = products
    weighted: Callable[[Array, Array], Array] = weighted
    row_sums: Callable[[Array], Array] = row_sums


def rounded(x: Array, dtype: DTypeLike) -> Array:
    """In x's dtype."""
    # The barrier keeps XLA from dropping both conversions, which it may do to be more exact.
    return lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)


def _rounding_to(dtype: DTypeLike | None) -> Rounding:
    def to_dtype(x: Array) -> Array:
        return x if dtype is None else rounded(x, dtype)

    return Rounding(to_dtype, lambda weights, total: to_dtype(weights / total), to_dtype)


class Terms(NamedTuple):
    """What scores are made of: the public functions' arguments of these names, as arrays."""

    scale: Any = None
    logits_soft_cap: float | None = None
    soft_cap_last: bool = False  # of the scores with all that is added to them
    alibi_slopes: Any = None  # [N]
    relative_bias: Any = None  # [N, 2 max + 1]
    bias: Any = None  # broadcasts to [B, N, T, S]

    def scores(self, products: Array, query_offset: Any) -> Array:
        """Of products of query and key, [B, N, T, S], scaled."""
        scores, cap = products, self.logits_soft_cap
        t, s = products.shape[-2:]
        if cap is not None and not self.soft_cap_last:
            scores = cap * jnp.tanh(scores / cap)
        if self.alibi_slopes is not None:
            distance = jnp.arange(s) - jnp.arange(t)[:, None]
            scores += jnp.asarray(self.alibi_slopes, scores.dtype)[:, None, None] * distance
        if self.relative_bias is not None:
            table = jnp.asarray(self.relative_bias, scores.dtype)
            rows = jnp.arange(t)[:, None] + jnp.reshape(jnp.asarray(query_offset), (-1, 1, 1))
            place = jnp.arange(s) - rows + table.shape[1] // 2  # [1 or B, T, S]
            scores += jnp.swapaxes(table[:, jnp.clip(place, 0, table.shape[1] - 1)], 0, 1)
        scores = scores if self.bias is None else scores + self.bias
        if cap is not None and self.soft_cap_last:
            scores = cap * jnp.tanh(scores / cap)
        return scores


def attention(
    query: Array,  # [B, T, N, H]
    key: Array,  # [B, S, K, H]
    value: Array,  # [B, S, K, V]
    *,
    round_to: DTypeLike | Rounding | None = None,
    kept: Any = None,  # bool [B, N, T, S]: False for weights that dropout has dropped
    dropout_rate: float = 0.0,
    **arguments: Any,
) -> tuple[Array, Array]:
    """out [B, T, N, V] and lse [B, T, N], in the inputs' dtype (fp32 or fp64 in the tests).

    round_to: round scores, probabilities and output to this dtype, or in this way.
    arguments: those of Terms and Masks, a dense mask, and sinks [N].
    """
    terms = Terms(**{x: arguments.pop(x) for x in Terms._fields if x in arguments})
    mask, sinks = arguments.pop("mask", None), arguments.pop("sinks", None)
    rounding = round_to if isinstance(round_to, Rounding) else _rounding_to(round_to)
    (b, t, n, h), s = query.shape, key.shape[1]
    seen = map(jnp.asarray, visible_keys(b, t, s, **arguments))
    # The barrier keeps XLA from folding constants of this size, for seconds.
    visible, broken = (lax.optimization_barrier(x)[:, None] for x in seen)
    if mask is not None:
        visible = visible & mask
    if terms.bias is not None:
        visible = visible & ~(terms.bias.astype(query.dtype) <= LEAST)
    # What nobody sees may hold NaN, and 0 * NaN is NaN: it is taken out of the products.
    used = visible.any((1, 3)) | broken[:, 0]
    query = jnp.where(used[..., None, None], query, 0)
    used = visible.any((1, 2))
    key, value = (
        jnp.where(used[..., None, None], x, 0).repeat(n // x.shape[2], axis=2) for x in (key, value)
    )

    scaled = rounding.products(query, key) * (h**-0.5 if terms.scale is None else terms.scale)
    scores = rounding.scores(terms.scores(scaled, arguments.get("query_offset", 0)))
    sees = visible.any(-1, keepdims=True)  # [B, 1 or N, T, 1]
    top = scores.max(-1, keepdims=True, initial=-jnp.inf, where=visible)
    sink = -jnp.inf if sinks is None else jnp.asarray(sinks, scores.dtype)[:, None, None]
    top = lax.stop_gradient(jnp.where(sees, jnp.maximum(top, sink), 0))
    weights = jnp.exp(jnp.where(visible, scores - top, -jnp.inf))
    total = rounding.row_sums(weights) + jnp.exp(jnp.where(sees, sink - top, 0))
    total = jnp.where(sees, total, 1)  # [B, N, T, 1]
    probabilities = rounding.probabilities(weights, total)
    if kept is not None:
        probabilities = jnp.where(kept, probabilities, 0)
    out = rounding.out(rounding.weighted(probabilities, value) / (1 - dropout_rate))
    lse = jnp.where(sees, top + jnp.log(total), -jnp.inf)[..., 0]
    # A broken row is NaN, and so is its gradient, but for a cotangent of 0; any other row that sees
    # nothing is 0, and so on.
    nothing, nan = nan_rows(broken[..., None], query.swapaxes(1, 2), value.shape[-1])
    out = jnp.where(sees, out, nothing)
    return out.swapaxes(1, 2), jnp.where(broken, nan[..., 0], lse).swapaxes(1, 2)
