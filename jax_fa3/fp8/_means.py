"""Vectors near the mean of all rows, which are subtracted before rows are quantized."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import max_dim, min_dim
from jax.typing import ArrayLike

from .._checks import Integers, array, integers, wrong
from .._integers import clamped
from .._problem import Config
from ._checks import check_not_quantized

# Rows that are read of a sequence, evenly spaced, in groups of neighbours: any vector will do. 256 rows
# give a mean to a twelfth of the standard deviation, 64 rows to a sixth. Of short sequences a 32nd of
# all rows, but no fewer than 64: more would take longer than what is gained (docs/kernel_notes/fp8.md).
GROUPS = 16
LEAST_ROWS, MOST_ROWS, SHARE = 4, 16, 32  # the first two of a group


def token_mean(x: ArrayLike, *, lengths: Integers | None = None) -> Array:
    """About the mean of x's rows, for `quantize` to subtract, after SageAttention (arXiv 2410.02367).

    The median of the means of 16 groups of neighbours, evenly spaced before the length: together 64 rows
    for T up to 2,048, a 32nd of T up to 8,192, 256 rows beyond; 0 in columns where the middle half of the
    groups' means spreads farther than their median is from 0. So without a mean nothing is subtracted,
    but in one column of 160 by chance; what is not finite does not count, and neither do numbers of any
    magnitude in a few of the groups.

    Args:
        x: [B, T, N, H], or [T, N, H]; a floating dtype of 16 bits or more.
        lengths: int32 [B]: rows from there on may hold anything.

    Returns: fp32 [B, N, H], or [N, H]. It has no derivative: one of 0.

    Raises ValueError: shapes or dtypes that mean nothing.
    """
    whole = array("x", x)
    if whole.ndim not in (3, 4):
        raise wrong("x", f"shape {whole.shape}", "(B, T, N, H), or (T, N, H)")
    check_not_quantized("x", whole)
    batched = whole.ndim == 4
    whole, counts = whole if batched else whole[None], None
    if lengths is not None:
        counts = clamped(integers("lengths", lengths, whole.shape[:1], batched))
    found = mean_of(lax.stop_gradient(whole), counts)
    return found if batched else found[0]


def mean_of(x: Array, lengths: Array | None) -> Array:
    """fp32 [B, N, H] of [B, T, N, H] and int32 [B]."""
    return _middle(*_sample(x, lengths))


def means_of(x: Array, y: Array, lengths: Array | None) -> tuple[Array, Array]:
    """mean_of both. Of one shape they are found together, by half as many kernels."""
    if x.shape != y.shape:
        return mean_of(x, lengths), mean_of(y, lengths)
    each = zip(_sample(x, lengths), _sample(y, lengths), strict=True)
    found = jax.vmap(_middle)(*map(jnp.stack, each))
    return found[0], found[1]


def _rows_of_group(length: Any) -> Any:
    """Of a length that may be symbolic: an exported program takes the rows that the call would."""
    share = length // (GROUPS * SHARE)
    return min_dim(MOST_ROWS, max_dim(LEAST_ROWS, share))


def _sample(x: Array, lengths: Array | None) -> tuple[Array, Array]:
    """Rows of x, fp32 [B, rows of all groups, N, H], and which of their numbers count, bool."""
    batch, length, heads, head_dim = x.shape
    count = GROUPS * _rows_of_group(length)
    i = jnp.arange(count, dtype=jnp.int32)[None]
    if length == 0:
        return jnp.zeros((batch, count, heads, head_dim), jnp.float32), jnp.zeros(
            (batch, count, heads, head_dim), bool
        )
    given = jnp.full(batch, length, jnp.int32) if lengths is None else lengths
    given = jnp.clip(given, 0, length)[:, None]
    rows = given // count * i + given % count * i // count  # i * length / count without overflow
    sample = jnp.take_along_axis(x, rows[..., None, None], axis=1, mode="clip").astype(jnp.float32)
    counts = jnp.isfinite(sample) & (given > 0)[..., None, None]
    return sample, counts


def _middle(sample: Array, counts: Array) -> Array:
    batch, rows, heads, head_dim = sample.shape
    grouped = batch, GROUPS, rows // GROUPS, heads, head_dim
    total = jnp.where(counts, sample, 0).reshape(grouped).sum(2)
    each = jnp.maximum(counts.astype(jnp.float32).reshape(grouped).sum(2), 1)
    means = _sorted([total[:, i] / each[:, i] for i in range(GROUPS)])
    median = (means[GROUPS // 2 - 1] + means[GROUPS // 2]) / 2
    spread = means[GROUPS * 3 // 4 - 1] - means[GROUPS // 4]
    return jnp.where(jnp.abs(median) > spread, median, 0)  # nor is a NaN greater


def _sorted(x: list[Array]) -> list[Array]:
    """Element by element, by Batcher's network: XLA fuses it, and sorts in a kernel of its own."""
    part = 1
    while part < len(x):
        distance = part
        while distance:
            for i in range(len(x) - distance):
                j = i + distance
                if (i - distance % part) // distance % 2 == 0 and i // (2 * part) == j // (
                    2 * part
                ):
                    x[i], x[j] = jnp.minimum(x[i], x[j]), jnp.maximum(x[i], x[j])
            distance //= 2
        part *= 2
    return x


def by_query_head(mean: Array, heads: int) -> Array:
    """[B, N, H] of [B, K, H]."""
    return jnp.repeat(mean, heads // max(mean.shape[1], 1), axis=1)


def shift(config: Config, query: Array, key_mean: Array) -> Array:
    """[B, N, T]: by how much key_mean raises the scores of query's rows, [B, T, N, H]."""
    mean = by_query_head(key_mean, query.shape[2])
    products = jnp.einsum("btnh,bnh->bnt", query.astype(jnp.float32), mean, precision="highest")
    return config.scale * products


def shifted(lse: Array, by: Array) -> Array:
    """The log-sum-exp [B, N, T] of scores that are raised by so much."""
    # Query rows that see nothing may hold NaN.
    return jnp.where(lse == -jnp.inf, lse, lse + by)


def resolved(smooth_k: Any, smooth_v: Any, fixed: bool) -> tuple[bool, bool]:
    """The options smooth_k and smooth_v of a call; fixed: a constant added to all scores of a row
    changes its weights, for there is a soft cap, or a sink that does not have it."""
    for name, x in (("smooth_k", smooth_k), ("smooth_v", smooth_v)):
        if not (isinstance(x, bool) or (x is None and name == "smooth_k")):
            raise wrong(
                name, repr(x), "True or False" + (", or None" if name == "smooth_k" else "")
            )
    if smooth_k and fixed:
        wanted = "False or None beside logits_soft_cap or sinks, for it adds a constant to a row's scores"
        raise wrong("smooth_k", True, wanted)
    return (not fixed if smooth_k is None else smooth_k), smooth_v


def refuse_smoothing(options: dict[str, Any]) -> None:
    """Of arrays that are quantized already."""
    for name in ("smooth_k", "smooth_v"):
        if name in options:
            wanted = "nothing: jax_fa3.fp8.quantize(mean=) subtracts means before it quantizes"
            raise wrong(name, repr(options[name]), wanted)
