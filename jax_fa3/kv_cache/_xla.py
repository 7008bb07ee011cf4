"""Attention over a cache in plain JAX, for every platform: blocks of positions, one after the other.

Query rows are cut into tiles of R rows of one sequence. A group of tiles is computed at a time: block
by block its keys and values are gathered from the cache, and only from where a row of the tile may
look. Memory is linear in everything, and loops end where the longest sequence does.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from .._problem import Window, wide
from .._varying import vary_as, vary_together
from ._layout import KEY, VALUE, Caches, Layout
from ._scales import scale_of
from ._sequences import (
    LONGEST,
    Rows,
    Sequences,
    Where,
    address,
    lacks_pages,
    last_at_most,
    read_ranges,
    rows_of,
    sequences,
)

BLOCK = 512  # positions
MAX_ROWS, RAGGED_ROWS = 64, 16  # of a tile
GROUP_NUMBERS = 2**24  # gathered keys and values, and scores, at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """The static part of one call."""

    layout: Layout
    scale: float
    window: Window
    logits_soft_cap: float | None
    split_size: int | None


class Operands(NamedTuple):
    """The arrays of one call, but query. A pytree."""

    caches: Caches
    where: Where
    key_begin: Array | None = None  # [B], or one per row
    key_end: Array | None = None  # one per row
    sinks: Array | None = None  # [N]
    key_scale: Array | None = None  # as in _scales
    value_scale: Array | None = None


def attention(config: Config, query: Array, operands: Operands) -> tuple[Array, Array]:
    """query: [B, T, N, H] or [rows, N, H].

    Returns out [..., N, V] in query's dtype, and lse [..., N] in fp32 (fp64 for fp64).
    """
    *lead, num_heads, head_dim = query.shape
    layout, dtype = config.layout, wide(query.dtype)
    shape = (*lead, num_heads, layout.head_dim_v)
    batch = operands.where.lengths.shape[0]
    if 0 in shape or not batch:
        return jnp.zeros(shape, query.dtype), jnp.full(shape[:-1], -jnp.inf, dtype)
    query, operands = vary_together((query, operands))
    flat = query.reshape(-1, num_heads, head_dim)
    rows, page_size = flat.shape[0], layout.page_size(operands.caches)
    them = sequences(operands.where, rows, page_size)
    each = rows_of(them, rows)
    begin, end = _intervals(config, them, each, operands)
    needed = read_ranges(them, each, begin, end)
    mistaken = them.mistaken | lacks_pages(them, *needed, page_size, operands.caches[0].shape[0])
    wrong = each.real & mistaken[each.sequence]
    begin, end = jnp.where(wrong, 0, begin), jnp.where(wrong, 0, end)

    tile_rows, tiles = _tiling(config, lead, batch)
    block = config.split_size or min(BLOCK, max(1, them.table.shape[1] * page_size))
    numbers = block * (layout.num_kv_heads * (head_dim + layout.head_dim_v) + num_heads * tile_rows)
    group = 1 if config.split_size else min(tiles, max(1, GROUP_NUMBERS // numbers))
    tile_counts = (them.counts + (tile_rows - 1)) // tile_rows
    tile_stops = jnp.cumsum(tile_counts, dtype=jnp.int32)
    tile_starts = tile_stops - tile_counts

    def one_group(i: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        tile = i * group + jnp.arange(group, dtype=jnp.int32)
        # Among those that start at one tile the last has it: the others have no rows.
        sequence = last_at_most(tile_starts, tile)
        place = (tile - tile_starts[sequence])[:, None] * tile_rows
        place += jnp.arange(tile_rows, dtype=jnp.int32)[None]
        real = (place < them.counts[sequence][:, None]) & (tile < tile_stops[-1])[:, None]
        row = jnp.where(real, them.starts[sequence][:, None] + place, 0)
        interval = (jnp.where(real, x[row], 0) for x in (begin, end))
        found = _tiles(config, block, them, operands, sequence, flat[row], *interval)
        row = jnp.where(real, row, rows)  # which does not exist
        out, lse = (x.at[row].set(y, mode="drop") for x, y in zip(results, found, strict=True))
        return out, lse

    out = jnp.zeros((rows, *shape[-2:]), query.dtype)
    lse = jnp.full((rows, num_heads), -jnp.inf, dtype)
    groups = (tile_stops[-1] + (group - 1)) // group
    out, lse = lax.fori_loop(0, groups, one_group, (vary_as(out, flat), vary_as(lse, flat)))
    out = jnp.where(wrong[:, None, None], jnp.nan, out)
    lse = jnp.where(wrong[:, None], jnp.nan, lse)
    return out.reshape(shape), lse.reshape(shape[:-1])


def _intervals(
    config: Config, them: Sequences, each: Rows, operands: Operands
) -> tuple[Array, Array]:
    """[rows], [rows]: the positions that each row sees; 0, 0 if none."""
    left, right = config.window
    length = them.lengths[each.sequence]
    begin, end = jnp.zeros_like(length), length
    if left is not None:
        begin = jnp.maximum(begin, each.position - min(left, LONGEST))
    if right is not None:
        # The last row's position is length - 1: more than the rows right of one is past the end.
        end = jnp.minimum(end, each.position + (1 + min(right, each.position.shape[0])))
    if operands.key_begin is not None:
        of_row = operands.key_begin.reshape(-1)
        if of_row.shape == them.counts.shape:
            of_row = of_row[each.sequence]
        begin = jnp.maximum(begin, of_row)
    if operands.key_end is not None:
        end = jnp.minimum(end, operands.key_end.reshape(-1))
    sees = each.real & (begin < end)
    return jnp.where(sees, begin, 0), jnp.where(sees, end, 0)


def _tiling(config: Config, lead: list[int], batch: int) -> tuple[int, int]:
    """(rows of a tile, how many tiles there are at most).

    With split_size a row is always in a tile of the same size, alone in its group, so that nothing
    about it depends on the other sequences, and neither does how its numbers are rounded.
    """
    if len(lead) == 2:
        tile_rows = RAGGED_ROWS if config.split_size else min(lead[1], MAX_ROWS)
        return tile_rows, batch * -(-lead[1] // tile_rows)
    rows = lead[0]
    tile_rows = 1 if rows <= batch and not config.split_size else RAGGED_ROWS
    return tile_rows, (rows + min(batch, rows) * (tile_rows - 1)) // tile_rows


def _tiles(
    config: Config,
    block: int,
    them: Sequences,
    operands: Operands,
    sequence: Array,
    query: Array,
    begin: Array,
    end: Array,
) -> tuple[Array, Array]:
    """Of g tiles, each of one sequence: query [g, R, N, H] and the intervals [g, R] of its rows.

    Returns out [g, R, N, V] and lse [g, R, N].
    """
    layout, dtype = config.layout, wide(query.dtype)
    tiles, rows, num_heads, head_dim = query.shape
    heads = layout.num_kv_heads, num_heads // layout.num_kv_heads  # (K, G)
    widened = query.reshape(tiles, rows, *heads, head_dim).astype(dtype) * config.scale
    # GPUs multiply fp32 as TF32 by default, which has as few bits as fp16.
    precision: Any = "highest" if query.dtype == jnp.float16 else None
    sees = begin < end
    first = jnp.min(begin, 1, initial=LONGEST, where=sees)
    last = jnp.max(end, 1, initial=0, where=sees)

    def one_block(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = sums
        position = (i * block + jnp.arange(block, dtype=jnp.int32))[None]  # [1, block]
        needed = (first[:, None] <= position) & (position < last[:, None])  # [g, block]
        page_size = layout.page_size(operands.caches)
        pages, slots = address(them, sequence[:, None], position, page_size)
        pages = jnp.where(needed, pages, 0)
        key, value = (
            layout.read(operands.caches, which, pages, slots).astype(dtype)
            * scale_of(scale, layout, sequence, pages, slots, dtype)
            for which, scale in ((KEY, operands.key_scale), (VALUE, operands.value_scale))
        )
        value = jnp.where(needed[..., None, None], value, 0)  # for 0 * NaN is NaN
        scores = jnp.einsum("trkgh,tskh->tkrgs", widened, key, precision=precision)
        if config.logits_soft_cap is not None:
            scores = config.logits_soft_cap * jnp.tanh(scores / config.logits_soft_cap)
        position = position[None]
        visible = (begin[..., None] <= position) & (position < end[..., None])  # [g, R, block]
        visible = visible[:, None, :, None]
        new = jnp.max(scores, -1, initial=-jnp.inf, where=visible)
        new = jnp.maximum(top, new)
        shift = jnp.where(new == -jnp.inf, 0, new)
        weights = jnp.exp(jnp.where(visible, scores - shift[..., None], -jnp.inf))
        rescale = jnp.exp(top - shift)
        total = total * rescale + weights.sum(-1)
        out *= rescale[..., None]
        out += jnp.einsum("tkrgs,tskv->tkrgv", weights, value, precision=precision)
        return new, total, out

    each = tiles, heads[0], rows, heads[1]
    top = jnp.full(each, -jnp.inf, dtype)
    sums = top, jnp.zeros_like(top), jnp.zeros((*each, layout.head_dim_v), dtype)
    blocks = jnp.min(first) // block, (jnp.max(last) + (block - 1)) // block
    varying = tuple(vary_as(x, query) for x in sums)
    top, total, out = lax.fori_loop(*blocks, one_block, varying)

    sees = sees[:, None, :, None]
    top, total = jnp.where(sees, top, 0), jnp.where(sees, total, 1)
    if operands.sinks is not None:  # one more key, whose value is 0
        sink = operands.sinks.astype(dtype).reshape(1, heads[0], 1, heads[1])
        new = jnp.maximum(top, sink)
        rescale = jnp.exp(top - new)
        top, total, out = new, total * rescale + jnp.exp(sink - new), out * rescale[..., None]
    lse = jnp.where(sees, top + jnp.log(total), -jnp.inf)
    out = jnp.where(sees[..., None], out / total[..., None], 0).astype(query.dtype)
    out, lse = jnp.moveaxis(out, 1, 2), jnp.moveaxis(lse, 1, 2)  # [g, R, K, G, ...]
    return out.reshape(tiles, rows, num_heads, -1), lse.reshape(tiles, rows, num_heads)
