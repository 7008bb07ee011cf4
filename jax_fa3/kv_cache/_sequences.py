"""Which query rows belong to which sequence, at which position, and where in the cache that is.

Everything is ragged here: [rows, ...], the rows of a sequence one after the other. A rectangular call
is one whose sequences all have T of them. All integers are int32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from .._integers import INT32_MAX

# Positions of one sequence, so that sums of them and of rows stay int32. Longer ones are mistakes.
LONGEST = 2**30


class Where(NamedTuple):
    """The arguments that say where things are. A pytree."""

    lengths: Array  # [B], the new rows included
    table: Array | None = None  # [B, pages], or cache_rows [B, 1]; None: row b is sequence b's
    starts: Array | None = None  # [B + 1], of a ragged call
    num_sequences: Array | None = None  # []


class Sequences(NamedTuple):
    """[B] each. Those that do not count, such as the ones from num_sequences on, have no rows."""

    starts: Array  # the first row; INT32_MAX for those from num_sequences on
    counts: Array  # rows
    lengths: Array  # at least 0, at most the capacity
    table: Array  # [B, pages]
    mistaken: Array  # bool: its rows are NaN, and nothing is written


class Rows(NamedTuple):
    """[rows] each."""

    sequence: Array
    position: Array  # negative for rows that are more than the sequence is long
    real: Array  # bool: it is a row of a sequence


def sequences(where: Where, rows: int, page_size: int) -> Sequences:
    batch = where.lengths.shape[0]
    each = jnp.arange(batch, dtype=jnp.int32)
    table = each[:, None] if where.table is None else where.table
    starts = where.starts
    if starts is None:
        starts = jnp.arange(batch + 1, dtype=jnp.int32) * jnp.int32(rows // max(batch, 1))
    ours = jnp.ones(batch, bool)
    if where.num_sequences is not None:
        ours = each < where.num_sequences
    first, stop = starts[:-1], starts[1:]
    back = (ours & (stop < first)).any()  # then it is not clear whose rows are whose
    mistaken = ours & ((first < 0) | (stop > rows) | back)
    bounds = lax.cummax(jnp.clip(starts, 0, rows))
    first = bounds[:-1]
    counts = jnp.where(ours, bounds[1:] - first, 0)
    capacity = min(table.shape[1] * page_size, LONGEST)
    mistaken |= (counts > 0) & (where.lengths > capacity)
    lengths = jnp.clip(where.lengths, 0, capacity)
    return Sequences(jnp.where(ours, first, INT32_MAX), counts, lengths, table, mistaken)


def rows_of(them: Sequences, rows: int) -> Rows:
    row = jnp.arange(rows, dtype=jnp.int32)
    sequence = last_at_most(them.starts, row)
    place = row - them.starts[sequence]
    count = them.counts[sequence]
    position = them.lengths[sequence] - count + place
    return Rows(sequence, position, (0 <= place) & (place < count))


def last_at_most(ascending: Array, x: Array) -> Array:
    """The last i with ascending[i] <= x, elementwise; 0 where there is none."""
    ascending = ascending.reshape(*[1] * x.ndim, -1)
    return jnp.maximum((ascending <= x[..., None]).sum(-1, dtype=jnp.int32) - 1, 0)


def read_ranges(them: Sequences, rows: Rows, begin: Array, end: Array) -> tuple[Array, Array]:
    """The positions [B], [B] from and up to which the intervals of each sequence's rows reach."""
    sees = begin < end
    first = jnp.full_like(them.counts, LONGEST)
    first = first.at[rows.sequence].min(jnp.where(sees, begin, LONGEST))
    last = jnp.zeros_like(them.counts).at[rows.sequence].max(jnp.where(sees, end, 0))
    return first, last


def lacks_pages(them: Sequences, first: Array, last: Array, page_size: int, pages: int) -> Array:
    """bool [B]: a page that is needed for positions [first, last) is not one of the cache's."""
    entry = jnp.arange(them.table.shape[1], dtype=jnp.int32)[None]
    needed = (first[:, None] // page_size <= entry) & (entry <= (last[:, None] - 1) // page_size)
    missing = (them.table < 0) | (them.table >= pages)
    return (needed & missing & (first < last)[:, None]).any(-1)


def address(
    them: Sequences, sequence: Array, position: Array, page_size: int
) -> tuple[Array, Array]:
    """Page and slot of positions; of those outside the sequence, any."""
    position = jnp.maximum(position, 0)
    entry = jnp.minimum(position // page_size, them.table.shape[1] - 1)
    return them.table[sequence, entry], position % page_size
