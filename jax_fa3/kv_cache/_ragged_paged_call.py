"""What the calls of engines for TPUs share: their caches' shapes, their checks, and the call itself."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from .._checks import array, wrong
from .._problem import E4M3
from ._append import append
from ._append_and_attend import append_and_attend
from ._attention import dot_product_attention
from ._layout import Layout

LANES = 128  # to whose multiples these caches pad head dims


def get_kv_cache_shape(
    total_num_pages: int,
    page_size: int,
    actual_num_kv_heads: int,
    actual_head_dim: int,
    kv_dtype: DTypeLike,
) -> tuple[int, int, int, int, int]:
    """Of the cache for `ragged_paged_attention`: [P, page, ceil(2K / p), p, ceil(H / 128) * 128],
    where p numbers of kv_dtype have 32 bits."""
    return _shape(total_num_pages, page_size, 2 * actual_num_kv_heads, actual_head_dim, kv_dtype)


def get_kv_cache_shape_hd64(
    total_num_pages: int, page_size: int, actual_num_kv_heads: int, kv_dtype: DTypeLike
) -> tuple[int, int, int, int, int]:
    """Of the cache for `ragged_paged_attention_hd64`: [P, page, ceil(K / p), p, 128]."""
    return _shape(total_num_pages, page_size, actual_num_kv_heads, LANES, kv_dtype)


def _shape(
    pages: int, page_size: int, heads: int, columns: int, dtype: DTypeLike
) -> tuple[int, int, int, int, int]:
    packed = max(1, 4 // jnp.dtype(dtype).itemsize)
    return pages, page_size, -(-heads // packed), packed, -(-columns // LANES) * LANES


_HINTS = {"skip_kv_mask", "out_dtype", "mask_value", "chunk_prefill_size", "d_block_sizes"}
_HINTS |= {"p_block_sizes", "m_block_sizes", "num_kv_pages_per_block", "num_queries_per_block"}
_HINTS |= {"vmem_limit_bytes", "debug_mode", "disable_bounds_checks", "disable_semaphore_checks"}


class Static(NamedTuple):
    layout: Layout
    is_causal: bool
    sliding_window: int | None
    soft_cap: float | None
    sm_scale: float
    scales: tuple[float | None, float | None, float | None]  # of query, key and value


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def run(
    static: Static,
    cache: Array,
    query: Array,
    new: tuple[Array, Array] | None,
    where: dict[str, Array],
    sinks: Array | None,
) -> tuple[Array, Array]:
    shared: dict[str, Any] = {**where, "kv_layout": static.layout}
    q_scale = static.scales[0]
    if q_scale is not None:
        most = jnp.asarray(jnp.finfo(cache.dtype).max, jnp.float32)
        narrow = jnp.clip(query.astype(jnp.float32) / q_scale, -most, most).astype(cache.dtype)
        query = narrow.astype(query.dtype)
    options = options_of(static.sm_scale, static.sliding_window, static.soft_cap, static.scales)
    options = {**options, "sinks": sinks, "is_causal": static.is_causal}
    if new is not None and (options["value_scale"] is None or cache.dtype == E4M3):
        out, cache, _ = append_and_attend(query, *new, cache, None, **shared, **options)
        return out, cache
    if new is not None:  # which are written as they are
        cache, _ = append(cache, None, *new, **shared)
    return dot_product_attention(query, cache, None, **shared, **options), cache


def options_of(
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    scales: tuple[float | None, float | None, float | None],
) -> dict[str, Any]:
    if sliding_window is not None and sliding_window < 1:
        raise wrong("sliding_window", sliding_window, "an int > 0, or None")
    q_scale, k_scale, v_scale = scales
    for x in (q_scale, k_scale):
        sm_scale *= 1.0 if x is None else x
    return {
        "scale": sm_scale,
        "local_window_size": None if sliding_window is None else (sliding_window - 1, 0),
        "logits_soft_cap": soft_cap,
        "value_scale": v_scale,
    }


def layout_of(kind: Literal["interleaved", "lanes"], q: Array, k: Array, kv_cache: Any) -> Layout:
    cache = array("kv_cache", kv_cache)
    if q.ndim != 3:
        raise wrong("queries", f"shape {q.shape}", "(tokens, N, H)")
    if k.ndim != 3 or (k.shape[0], k.shape[2]) != (q.shape[0], q.shape[2]):
        raise wrong("keys", f"shape {k.shape}", f"({q.shape[0]}, K, {q.shape[2]}) as queries has")
    if k.dtype != cache.dtype:
        raise wrong("keys", f"dtype {k.dtype}", f"{cache.dtype}, as kv_cache has")
    heads, columns = k.shape[1] * (2 if kind == "interleaved" else 1), q.shape[2]
    columns *= 2 if kind == "lanes" else 1
    if cache.ndim != 5 or math.prod(cache.shape[2:4]) < heads or cache.shape[4] < columns:
        wanted = f"(pages, page size, a, b, c) with a * b >= {heads} and c >= {columns}"
        raise wrong("kv_cache", f"shape {cache.shape}", wanted)
    return Layout(kind, k.shape[1], q.shape[2], q.shape[2])


def where_of(
    kv_lens: Any, page_indices: Any, cu_q_lens: Any, distribution: Any
) -> dict[str, Array]:
    lengths, table = array("kv_lens", kv_lens), array("page_indices", page_indices)
    if lengths.ndim != 1:
        raise wrong("kv_lens", f"shape {lengths.shape}", "(B,)")
    if table.ndim != 1 or table.size % max(1, lengths.size):
        wanted = f"one axis, a multiple of {lengths.size} for as many sequences"
        raise wrong("page_indices", f"shape {table.shape}", wanted)
    counts = array("distribution", distribution)
    if counts.shape != (3,):
        raise wrong("distribution", f"shape {counts.shape}", "(3,)")
    return {
        "key_value_seq_lengths": lengths,
        "page_table": table.reshape(lengths.size, -1),
        "query_starts": array("cu_q_lens", cu_q_lens),
        "num_sequences": counts[2],
    }


def check_hints(function: str, hints: dict[str, Any]) -> None:
    unknown = hints.keys() - _HINTS
    if unknown:
        raise TypeError(f"{min(unknown)}: not an argument of {function}")
