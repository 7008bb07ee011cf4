"""A bias by distance, as T5 has it: of each head a table, of which the entry of (key - query row) is added
to the scaled scores, so no array has T x S elements.

The user's table [N, 2 max + 1] becomes one of every distance there is, [1 or B, N, T + S], first of all:
operands hold that, JAX differentiates it, and nothing behind has to clip a distance.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._checks import array, check_floating, natural, static_bool, wrong
from ._integers import saturating_add
from ._kernel_sizes import bwd_tile
from ._operands import Operands
from ._problem import Config, Sizes
from ._values import offset_of

_MARGIN = 256  # entries on either side that tiles read beyond the arrays (kRelativeMargin of cpp/problem.h)
_WARPS = 8  # of kBwdConsumerThreads in cpp/plan.h


def t5_relative_bias(
    buckets: ArrayLike, *, max_distance: int = 128, bidirectional: bool = True
) -> Array:
    """relative_bias of `dot_product_attention` from T5's embedding of buckets (Raffel et al., arXiv
    1910.10683): near distances have a bucket each, farther ones share them logarithmically.

    Args:
        buckets: floating [N, buckets], differentiable: the learned bias of each head's buckets.
        max_distance: from which on all distances share the last bucket; a static int.
        bidirectional: half of the buckets are for keys behind the query's row (encoders); else those
            share the bucket of distance 0 (decoders).

    Returns: [N, 2 * max_distance + 1], in buckets' dtype.

    Raises ValueError where there are too few buckets, or as many as distances.
    """
    x = array("buckets", buckets)
    check_floating("buckets", x)
    if x.ndim != 2:
        raise wrong("buckets", f"shape {x.shape}", "(N, buckets)")
    two_sided = static_bool("bidirectional", bidirectional)
    farthest, count = natural("max_distance", max_distance), x.shape[1]
    each = count // 2 if two_sided else count
    exact = each // 2
    if not 0 < exact < farthest:
        wanted = f"at least {4 if two_sided else 2}, and fewer than max_distance={farthest} allows"
        raise wrong("buckets", f"{count} buckets", wanted)
    distance = np.arange(-farthest, farthest + 1)
    away = np.abs(distance) if two_sided else np.maximum(-distance, 0)
    # In fp32, as T5 and its descendants compute it: they round to the same buckets.
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / exact) / math.log(farthest / exact)
    far = exact + (ratio * (each - exact)).astype(np.int32)
    bucket = np.where(away < exact, away, np.minimum(far, each - 1))
    bucket += np.where(two_sided & (distance > 0), each, 0)
    # A product, whose gradient is one too: that of indexing would be added up in any order.
    chosen = np.equal(bucket, np.arange(count)[:, None])
    return jnp.matmul(x, jnp.asarray(chosen, x.dtype), precision="highest")


def of_all_distances(
    table: ArrayLike | None, sizes: Sizes, query_offset: Any, batched: bool, dtype: Any
) -> Array | None:
    """The user's [N, 2 max + 1] as [1 or B, N, T + S]: what is added from distance -T on, in dtype."""
    if table is None:
        return None
    x = array("relative_bias", table)
    check_floating("relative_bias", x)
    if x.ndim != 2 or x.shape[0] != sizes.num_heads or x.shape[1] % 2 == 0:
        wanted = f"({sizes.num_heads}, 2 * max + 1), a table for each query head"
        raise wrong("relative_bias", f"shape {x.shape}", wanted)
    x, farthest = x.astype(dtype), x.shape[1] // 2
    length, key_length = sizes.query_length, sizes.key_length
    static, offset = offset_of(query_offset, sizes.batch, batched)
    if any(jax.export.is_symbolic_dim(n) for n in (length, key_length)):
        offset = jnp.zeros(1, jnp.int32) if offset is None else saturating_add(offset, 0)
        distance = jnp.arange(-length, key_length) - offset[:, None]
        place = jnp.clip(distance + (0 if static is None else -static), -farthest, farthest)
        return jnp.moveaxis(x[:, place + farthest], 1, 0)
    if offset is None:
        return _entries(x, farthest - length - (static or 0), length + key_length)[None]
    # From a longer table, cut for each batch entry: beyond these offsets all is one entry.
    most, least = key_length + farthest, -(length + farthest)
    place = most - jnp.clip(saturating_add(offset, 0), least, most)
    longer = _entries(x, farthest - length - most, length + key_length + most - least)
    longer = jnp.broadcast_to(longer, (place.shape[0], *longer.shape))

    def cut(x: Array, place: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, place, length + key_length, 1)

    return jax.vmap(cut)(longer, place)


def _entries(x: Array, first: int, count: int) -> Array:
    """x[:, first : first + count], with the first and the last column again where there are no others."""
    width = x.shape[1]
    before, after = (min(max(n, 0), count) for n in (-first, first + count - width))
    inside = x[:, min(max(first, 0), width) : min(max(first + count, 0), width)]
    ends = zip((x[:, :1], x[:, -1:]), (before, after), strict=True)
    left, right = (jnp.broadcast_to(end, (x.shape[0], n)) for end, n in ends)
    return jnp.concatenate((left, inside, right), axis=1)


def term(table: Array, rows: Array, key_length: int, length: int) -> Array:
    """What is added to the scores [..., R, S]: of a table [..., T + S] and rows int32 [R]."""
    return table[..., jnp.arange(key_length, dtype=jnp.int32) - rows[:, None] + length]


def for_kernels(config: Config, operands: Operands) -> Array | None:
    """The table as their operand, [1 or B, N, 2, size]: in units of q.k, with margins; and once more from its
    second entry on."""
    x = operands.relative_bias
    if x is None:
        return None
    behind = _size(operands.sizes) - _MARGIN - x.shape[2]
    x = jnp.pad(x / config.scale, ((0, 0), (0, 0), (_MARGIN, behind + 1)))
    return jnp.stack((x[..., :-1], x[..., 1:]), 2)


def _size(sizes: Sizes) -> Any:
    """Of a table with margins: relative_bias_size() of cpp/problem.h."""
    return (sizes.query_length + sizes.key_length + 2 * _MARGIN + 3) // 4 * 4


def parts(
    config: Config, sizes: Sizes, workspace: dict[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Of the gradient, as the backward writes it: one table, to which all add; or for a fixed order one
    of each warp that computes dS of a head."""
    count = 1
    if config.deterministic_backward:
        split, tile = workspace.get("dkv_parts"), bwd_tile(max(sizes.head_dim, sizes.head_dim_v))
        blocks = (sizes.key_length + tile.block_n - 1) // tile.block_n
        count = _WARPS * blocks * (1 if split is None else split.shape[0])
    shape = sizes.batch, sizes.num_heads, count, _size(sizes)
    return {"drelative": jax.ShapeDtypeStruct(shape, jnp.float32)}


def gradient(found: Array, sizes: Sizes) -> Array:
    """[B, N, T + S], of such parts."""
    return found.sum(2)[..., _MARGIN : _MARGIN + sizes.query_length + sizes.key_length]
