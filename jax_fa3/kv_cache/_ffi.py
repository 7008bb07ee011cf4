"""The custom call of the decoding kernel."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._custom_call import custom_call, score_attributes
from .._problem import E4M3
from .._targets import DECODE
from ._layout import LAYOUTS, Caches
from ._sequences import LONGEST, Where
from ._xla import Config, Operands

# The workspace, as cpp/decode/workspace.h has it: two tiles for each CTA, of which an SM takes two.
CTAS = 2 * 132
COUNTERS = CTAS + 132
TILE_ROWS = 64
SPLIT_MULTIPLE = 128
MOST_SPLITS = 64  # of a sequence: a CTA may have to keep a part of each


def capacity(config: Config, operands: Operands) -> int:
    """Positions that a sequence can have."""
    table, page_size = operands.where.table, config.layout.page_size(operands.caches)
    return min(page_size * (1 if table is None else table.shape[1]), LONGEST)


def splits_of(config: Config, operands: Operands) -> int:
    """Splits that a sequence can have; 0 without split_size."""
    return -(-capacity(config, operands) // config.split_size) if config.split_size else 0


def fits(config: Config, query: Array, operands: Operands) -> bool:
    """Whether the kernel counts its rows and its work in 32 bits, as cpp/decode/workspace.h has it."""
    rows, batch = math.prod(query.shape[:-1]), operands.where.lengths.shape[0]
    tiles = rows // 64 + 2 * (batch + 2) * max(config.layout.num_kv_heads, 1)
    return rows <= 2**29 and tiles * (capacity(config, operands) // 32 + 3) < 2**31


def attention(config: Config, query: Array, operands: Operands) -> tuple[Array, Array]:
    """Like _xla.attention, of what _kernel.refusal lets pass."""
    shape = (*query.shape[:-1], config.layout.head_dim_v)
    if 0 in shape or not operands.where.lengths.shape[0]:
        return jnp.zeros(shape, query.dtype), jnp.full(shape[:-1], -jnp.inf, jnp.float32)
    found = custom_call(
        DECODE,
        results_of(config, query, operands),
        attributes_of(config, query.shape[-2]),
        **arrays_of(query, operands),
    )
    return found["out"].reshape(shape), found["lse"].reshape(shape[:-1])


def results_of(config: Config, query: Array, operands: Operands) -> dict[str, Any]:
    """Of attention, and its workspace."""
    *lead, num_heads, _ = query.shape
    head_dim_v, rows = config.layout.head_dim_v, math.prod(lead)
    group = num_heads // config.layout.num_kv_heads
    ragged = operands.where.starts is not None
    tile_rows = min((rows if ragged else lead[1]) * group, TILE_ROWS)
    slots = CTAS * tile_rows * max(2, splits_of(config, operands))
    return {
        "out": jax.ShapeDtypeStruct((rows, num_heads, head_dim_v), query.dtype),
        "lse": jax.ShapeDtypeStruct((rows, num_heads), jnp.float32),
        "partials": jax.ShapeDtypeStruct((slots * (head_dim_v + 1),), jnp.float32),
        "arrivals": jax.ShapeDtypeStruct((2 * COUNTERS,), jnp.int32),
    }


def attributes_of(config: Config, num_heads: int) -> dict[str, Any]:
    layout = config.layout
    return {
        **score_attributes(config),
        "num_heads_q": num_heads,
        "num_heads_k": layout.num_kv_heads,
        "head_dim_v": layout.head_dim_v,
        "kv_layout": LAYOUTS.index(layout.kind),
        "split_size": config.split_size or 0,
    }


def arrays_of(query: Array, operands: Operands) -> dict[str, Any]:
    e4m3 = operands.caches[0].dtype == E4M3  # of which there always is a scale
    return {
        "query": query.reshape(-1, *query.shape[-2:]),
        **places_of(operands.caches, operands.where),
        "key_begin": operands.key_begin,
        "sinks": None if operands.sinks is None else operands.sinks.astype(jnp.float32),
        "key_scale": scale_of(operands.key_scale) if e4m3 else None,
        "value_scale": scale_of(operands.value_scale) if e4m3 else None,
    }


def places_of(caches: Caches, where: Where) -> dict[str, Any]:
    key_cache, value_cache = (*caches, jnp.zeros(0, caches[0].dtype))[:2]
    return {
        "key_cache": key_cache,
        "value_cache": value_cache,
        "lengths": where.lengths,
        "page_table": where.table,
        "query_starts": where.starts,
        "num_sequences": None if where.num_sequences is None else where.num_sequences.reshape(1),
    }


def scale_of(scale: Array | None) -> Array:
    if scale is None or scale.ndim == 0:
        return jnp.ones(1, jnp.float32) if scale is None else scale.reshape(1)
    return scale.reshape(scale.shape[:3])
