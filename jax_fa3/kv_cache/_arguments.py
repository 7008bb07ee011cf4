"""The arguments that the functions share, checked at trace time.

Every error names the argument, the value found and the value wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from .._checks import Integers, array, check_floating, integers, static_float, wrong
from .._integers import saturating_add
from .._problem import E4M3
from ._layout import LAYOUTS, Caches, KvLayout, Layout
from ._sequences import Where


class Call(NamedTuple):
    """Whose rows go where; the rows are those of query, or of key where something is appended."""

    layout: Layout
    caches: Caches
    where: Where
    shape: tuple[int, ...]  # of the rows, (B, T) or (rows,)

    @property
    def batch(self) -> int:
        return self.where.lengths.shape[0]


def checked_rows(name: str, x: Any, last: str, *, e4m3: bool = False) -> Array:
    """An array of rows; last: what its last two axes are called. e4m3: that dtype will do too."""
    found = array(name, x)
    if found.ndim not in (3, 4):
        raise wrong(name, f"shape {found.shape}", f"(B, T, {last}), or ragged (rows, {last})")
    check_floating(name, found)
    if found.dtype.itemsize < 2 and not (e4m3 and found.dtype == E4M3):
        raise wrong(name, f"dtype {found.dtype}", "a floating dtype of 16 bits or more")
    return found


def checked_call(name: str, rows: Array, given: Mapping[str, Any]) -> Call:
    """Where the caches have which rows.

    Args:
        name: of rows, query or key; their last axis is the keys'.
        given: the user's arguments by their names.
    """
    caches = given["key_cache"], given["value_cache"], given["kv_layout"]
    caches, layout = _checked_caches(name, rows, *caches)
    names = "key_value_seq_lengths", "query_starts", "num_sequences"
    key_value_seq_lengths, query_starts, num_sequences = (given[x] for x in names)
    page_size, (*shape, _, _) = layout.page_size(caches), rows.shape
    if page_size < 1:
        found = f"shape {caches[0].shape}"
        raise wrong("key_cache", found, "pages, or rows, of at least 1 position")
    batch = shape[0] if len(shape) == 2 else _length("key_value_seq_lengths", key_value_seq_lengths)
    lengths = _int32("key_value_seq_lengths", key_value_seq_lengths, batch)
    if len(shape) == 2 and query_starts is not None:
        wanted = f"None, as {name} has a batch axis: {rows.shape}; ragged rows have none"
        raise wrong("query_starts", "an array", wanted)
    if len(shape) == 1 and query_starts is None:
        raise wrong("query_starts", None, f"int32 [B + 1], as {name} is ragged: {rows.shape}")
    starts = None if query_starts is None else _int32("query_starts", query_starts, batch + 1)
    count = None
    if num_sequences is not None:
        shape_of_one = (1,) if _shape(num_sequences) == (1,) else ()
        count = _int32("num_sequences", num_sequences, *shape_of_one).reshape(())
    table = _checked_table(caches, batch, given["page_table"], given["cache_rows"])
    capacity = page_size * (1 if table is None else table.shape[1])
    if len(shape) == 2 and shape[1] > capacity:
        wanted = f"at most {capacity}, the positions that the cache has for a sequence"
        raise wrong(name, f"{shape[1]} rows", wanted)
    return Call(layout, caches, Where(lengths, table, starts, count), tuple(shape))


def _checked_table(
    caches: Caches, batch: int, page_table: Integers | None, cache_rows: Integers | None
) -> Array | None:
    if page_table is not None:
        if cache_rows is not None:
            raise wrong("cache_rows", "an array", "None, as page_table is given")
        shape = _shape(page_table)
        width = shape[1] if len(shape) == 2 else 1
        if not width:
            raise wrong("page_table", f"shape {shape}", "at least one page for each sequence")
        return _int32("page_table", page_table, batch, width)
    if cache_rows is not None:
        return _int32("cache_rows", cache_rows, batch)[:, None]
    if caches[0].shape[0] != batch:
        found = f"None for {batch} sequences and a key_cache of shape {caches[0].shape}"
        wanted = "int32 [B], the cache's row of each sequence, or page_table=, if these are pages"
        raise wrong("cache_rows", found, wanted)
    return None


def _checked_caches(
    name: str, rows: Array, key_cache: Any, value_cache: Any, kv_layout: KvLayout | Layout
) -> tuple[Caches, Layout]:
    key, head_dim = array("key_cache", key_cache), rows.shape[-1]
    kind = kv_layout.kind if isinstance(kv_layout, Layout) else kv_layout
    if kind not in LAYOUTS:
        raise wrong("kv_layout", repr(kind), " or ".join(map(repr, LAYOUTS)))
    both = kind in ("NHD", "HND")
    if both != (value_cache is not None):
        found = "None" if both else "an array"
        wanted = "an array" if both else "None, for key_cache holds both"
        raise wrong("value_cache", found, f"{wanted}, as kv_layout is {kind!r}")
    value = array("value_cache", value_cache) if both else key
    if key.dtype not in (rows.dtype, E4M3):
        wanted = f"{rows.dtype}, as {name} has, or {E4M3.name}"
        raise wrong("key_cache", f"dtype {key.dtype}", wanted)
    if value.dtype != key.dtype:
        wanted = f"{key.dtype}, as key_cache has"
        raise wrong("value_cache", f"dtype {value.dtype}", wanted)
    shapes = {
        "NHD": "(pages, page size, K, H)",
        "HND": "(pages, K, page size, H)",
        "interleaved": "(pages, page size, 2K, H)",
        "lanes": "(pages, page size, K, H + V)",
    }
    found, wanted = f"shape {key.shape}", f"{shapes[kind]} with H = {head_dim}, as {name} has"
    if key.ndim not in ((4,) if both else (4, 5)):
        raise wrong("key_cache", found, wanted)
    if isinstance(kv_layout, Layout):
        return (key,), kv_layout
    heads = key.shape[1] if kind == "HND" else math.prod(key.shape[2:-1])
    odd = kind == "interleaved" and heads % 2
    too_short = kind == "lanes" and key.shape[-1] <= head_dim
    if odd or too_short or (kind != "lanes" and key.shape[-1] != head_dim):
        raise wrong("key_cache", found, wanted)
    if value.ndim != key.ndim or value.shape[:-1] != key.shape[:-1]:
        wanted = f"{(*key.shape[:-1], 'V')} to go with key_cache {key.shape}"
        raise wrong("value_cache", f"shape {value.shape}", wanted)
    head_dim_v = key.shape[-1] - head_dim if kind == "lanes" else value.shape[-1]
    heads = heads // 2 if kind == "interleaved" else heads
    return (key, value) if both else (key,), Layout(kind, heads, head_dim, head_dim_v)


def checked_scale(name: str, scale: Any, call: Call) -> Array | None:
    """fp32 [], [K], [B, K], or per token and head as Layout.read_per_token wants it."""
    if scale is None:
        return None
    x = array(name, scale)
    layout, cache = call.layout, call.caches[0]
    heads, per_page = layout.num_kv_heads, (cache.shape[0], layout.page_size(call.caches))
    per_token = (*per_page, heads) if layout.kind != "HND" else (per_page[0], heads, per_page[1])
    allowed = (), (heads,), (call.batch, heads), per_token, (*per_token, 1)
    if x.shape not in allowed:
        texts = "a scalar, [K], [B, K], or one per token and head of the cache"
        wanted = f"{texts}: {' or '.join(map(str, allowed[:4]))}"
        raise wrong(name, f"shape {x.shape}", wanted)
    if not jnp.issubdtype(x.dtype, jnp.floating) and not jnp.issubdtype(x.dtype, jnp.integer):
        raise wrong(name, f"dtype {x.dtype}", "real numbers")
    return x.astype(jnp.float32)


def per_row(name: str, x: Integers | None, call: Call, *, or_sequence: bool) -> Array | None:
    """int32, one for each row, or, if allowed, one for each sequence."""
    if x is None:
        return None
    shape = (call.batch,) if or_sequence and _shape(x) == (call.batch,) else call.shape
    if or_sequence and _shape(x) not in ((call.batch,), call.shape):
        found, wanted = f"shape {_shape(x)}", f"{(call.batch,)} or {call.shape}"
        integers(name, x, _shape(x), True)  # says what it is, if it is no array
        raise wrong(name, found, wanted)
    return _int32(name, x, *shape)


def checked_heads(query: Array, call: Call, name: str = "query") -> None:
    """That the heads of query fit those of the cache."""
    heads, kv_heads = query.shape[-2], call.layout.num_kv_heads
    if heads % kv_heads if kv_heads else heads:
        found, wanted = f"{heads} heads", f"a multiple of the {kv_heads} key/value heads"
        raise wrong(name, found, wanted)


def checked_score_scale(scale: Any, head_dim: int) -> float:
    return 1 / math.sqrt(head_dim) if scale is None else static_float("scale", scale)


def _length(name: str, x: Any) -> int:
    shape = _shape(x)
    if len(shape) != 1:
        integers(name, x, shape, True)
        raise wrong(name, f"shape {shape}", "(B,)")
    return shape[0]


def _int32(name: str, x: Integers, *shape: int) -> Array:
    """Beyond int32 are no lengths, pages or rows: its extremes stand for what is there."""
    return saturating_add(integers(name, x, shape, True), 0)


def _shape(x: Any) -> tuple[int, ...]:
    try:
        return np.shape(x)
    except ValueError:  # rows of unequal lengths, which `integers` refuses by name
        return ()
