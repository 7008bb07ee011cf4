"""New keys and values into a cache, in plain JAX.

Each write is an XLA scatter on the cache at its own rank: in place, if the caller gives the cache away.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from .._problem import E4M3, wide
from .._varying import vary_together
from ._layout import KEY, VALUE, Caches, Layout
from ._rotary import Tables, rotate
from ._scales import quantized, scale_of
from ._sequences import Where, address, lacks_pages, rows_of, sequences


@dataclasses.dataclass(frozen=True)
class Config:
    """The static part of one call."""

    layout: Layout
    rotary_interleaved: bool


class Operands(NamedTuple):
    """The arrays of one call, but key. A pytree."""

    value: Array  # as key
    caches: Caches
    where: Where
    query: Array | None = None
    positions: Array | None = None  # [rows]
    tables: Tables | None = None
    key_scale: Array | None = None  # as in _scales
    value_scale: Array | None = None


def write(config: Config, key: Array, operands: Operands) -> tuple[Array, ...]:
    """key: [B, T, K, H] or [rows, K, H].

    Returns the caches, and query rotated if there is one.
    """
    key, operands = vary_together((key, operands))
    layout, caches, query = config.layout, operands.caches, operands.query
    more = () if query is None else (query,)
    rows = key.reshape(-1, *key.shape[-2:])
    count, pages = rows.shape[0], caches[0].shape[0]
    if not count or not operands.where.lengths.shape[0]:
        return *caches, *more
    values = operands.value.reshape(count, *operands.value.shape[-2:])
    page_size = layout.page_size(caches)
    them = sequences(operands.where, count, page_size)
    each = rows_of(them, count)
    first = jnp.maximum(them.lengths - them.counts, 0)
    last = jnp.where(them.counts > 0, them.lengths, 0)
    mistaken = them.mistaken | lacks_pages(them, first, last, page_size, pages)

    if operands.tables is not None:
        at = each.position if operands.positions is None else operands.positions.reshape(-1)
        beyond = each.real & (at >= operands.tables.cos.shape[0])
        mistaken |= jnp.zeros_like(mistaken).at[each.sequence].max(beyond)
        rows = rotate(rows, operands.tables, at, config.rotary_interleaved)
        if query is not None:
            flat = query.reshape(count, *query.shape[-2:])
            flat = rotate(flat, operands.tables, at, config.rotary_interleaved)
            wrong = each.real & mistaken[each.sequence]
            flat = jnp.where(wrong[:, None, None], jnp.nan, flat)
            more = (flat.reshape(query.shape),)

    written = each.real & (each.position >= 0) & ~mistaken[each.sequence]
    at_page, slots = address(them, each.sequence, each.position, page_size)
    for which, x, scale in (
        (KEY, rows, operands.key_scale),
        (VALUE, values, operands.value_scale),
    ):
        dtype = caches[which % len(caches)].dtype
        if x.dtype != dtype or (scale is not None and dtype != E4M3):
            safe = jnp.where(written, at_page, 0)
            of_rows = scale_of(scale, layout, each.sequence, safe, slots, wide(x.dtype))
            x = quantized(x, of_rows, dtype)
        caches = layout.write(caches, which, jnp.where(written, at_page, pages), slots, x)
    return *caches, *more
