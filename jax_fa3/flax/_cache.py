"""What a layer that decodes does with its cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from .. import kv_cache
from .._arguments import MaskArrays
from .._attention import dot_product_attention
from .._checks import wrong

if TYPE_CHECKING:
    from ._layer import Layer

MOST_ROWS = 64  # for each KV head; more are a prompt's, which the kernels of training take faster


class Cache(NamedTuple):
    """Keys and values seen so far, with Flax's names for them."""

    cached_key: Array  # [B, L, K, H], and so is cached_value; L positions, of which
    cached_value: Array
    cache_index: Array  # int32 [], this many are filled


def step(
    layer: Layer,
    query: Array,
    key: Array,
    value: Array,
    arguments: dict[str, Any],
    cache: Cache,
) -> tuple[Array, Cache]:
    """Attention of the next rows, and the cache with them; arguments: those of
    `jax_fa3.dot_product_attention`."""
    arrays = {"sinks": arguments["sinks"], "key_begin": arguments.get("key_begin")}
    static = {name: x for name, x in arguments.items() if name not in arrays}
    by_attention = functools.partial(_by_attention, layer, static)
    options = _of_kv_cache(layer, query, key, arguments)
    if options is None:
        return by_attention(query, key, value, cache, arrays)
    # Which has no derivatives: these are those of the other way.
    by_kv_cache = jax.custom_jvp(functools.partial(_by_kv_cache, options))
    by_kv_cache.defjvp(functools.partial(jax.jvp, by_attention))
    return by_kv_cache(query, key, value, cache, arrays)


def _by_kv_cache(
    options: dict[str, Any], query: Array, key: Array, value: Array, cache: Cache, arrays: Any
) -> tuple[Array, Cache]:
    filled = cache.cache_index + query.shape[-3]
    begin = arrays["key_begin"]
    out, keys, values = kv_cache.append_and_attend(
        *(query, key, value, cache.cached_key, cache.cached_value),
        jnp.full(query.shape[0], filled, jnp.int32),
        sinks=arrays["sinks"],
        key_begin=None if begin is None else begin[:, 0],
        **options,
    )
    return out, Cache(keys, values, filled)


def _by_attention(
    layer: Layer,
    static: dict[str, Any],
    query: Array,
    key: Array,
    value: Array,
    cache: Cache,
    arrays: Any,
) -> tuple[Array, Cache]:
    filled = cache.cache_index + query.shape[-3]
    # Where the cache is too short this overwrites its end; nobody sees that, for cache_index stays
    # past the end and so every later result is NaN as well.
    cached_key, cached_value = (
        lax.dynamic_update_slice_in_dim(x, new, cache.cache_index, axis=x.ndim - 3)
        for x, new in ((cache.cached_key, key), (cache.cached_value, value))
    )
    arguments = {**static, **arrays, "query_offset": cache.cache_index}
    out = call(layer.attention_fn, query, cached_key, cached_value, arguments)
    out = jnp.where(filled <= cached_key.shape[-3], out, jnp.nan)
    return out, Cache(cached_key, cached_value, filled)


def _of_kv_cache(
    layer: Layer, query: Array, key: Array, arguments: dict[str, Any]
) -> dict[str, Any] | None:
    """The arguments of jax_fa3.kv_cache, but arrays, where it does the step: few rows, whose intervals
    begin together and have no end of their own."""
    if layer.attention_fn is not dot_product_attention or query.ndim != 4:
        return None
    batch, rows, heads, _ = query.shape
    begin, has_end = arguments.get("key_begin"), arguments.get("key_end") is not None
    one_begin = begin is None or (rows == 1 and np.shape(begin) == (batch, 1))
    static = layer.scale is None or isinstance(layer.scale, (int, float))
    few = rows * (heads // max(key.shape[-2], 1)) <= MOST_ROWS
    if not (few and one_begin and static) or has_end:
        return None
    names = "local_window_size", "logits_soft_cap", "scale", "implementation"
    return {name: arguments[name] for name in names}


def check(
    layer: Layer, query: Array, key: Array, value: Array, masks: MaskArrays, cache: Cache
) -> None:
    if not layer.is_causal:
        raise wrong("is_causal", False, "True for a layer that decodes")
    for name, x in masks.items():
        if x is not None and name not in ("key_begin", "key_end"):
            wanted = "None: decoding takes key_begin and key_end alone, positions in the cache"
            raise wrong(name, "an array", wanted)
    *batch, length, num_heads, head_dim = cache.cached_key.shape
    new = query.shape[-3]
    wanted = (*batch, new, num_heads, head_dim)
    for name, x in (("key", key), ("value", value)):
        if x.shape != wanted:
            reason = f"the cache's {wanted}: make it again for this batch"
            raise wrong(f"cached_{name}", f"new entries of shape {x.shape}", reason)
        if x.dtype != cache.cached_key.dtype:
            reason = f"the cache's {cache.cached_key.dtype}: make it with dtype {x.dtype}"
            raise wrong(f"cached_{name}", f"new entries of dtype {x.dtype}", reason)
    index = cache.cache_index
    if not isinstance(index, Tracer) and int(index) + new > length:
        wanted = f"room for {new} more: make the cache for a longer input, or start a new one"
        raise wrong("cache_index", f"{int(index)} of {length} positions filled", wanted)


def call(
    attention_fn: Callable[..., Any],
    query: Array,
    key: Array,
    value: Array,
    arguments: dict[str, Any],
) -> Array:
    """attention_fn with only what is not its default, so that jax.nn's function can stand in."""
    given = {k: x for k, x in arguments.items() if x is not None and x is not False}
    return attention_fn(query, key, value, **given)
