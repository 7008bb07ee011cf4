"""What the linen and the nnx layer share: everything between their projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from .._arguments import MaskArrays
from .._checks import Integers, array, static_float, wrong
from .._problem import Implementations, Window
from . import _cache
from ._cache import Cache
from ._precision import matmul_precision

# What the projections leave for the attention's backward. jax.checkpoint with the policy
# save_only_these_names(*PROJECTION_NAMES, *jax_fa3.RESIDUAL_NAMES) computes neither again.
PROJECTION_NAMES = ("jax_fa3_query", "jax_fa3_key", "jax_fa3_value")

_Function = TypeVar("_Function", bound=Callable[..., Any])
KernelAxes = tuple[str | None, str | None] | None


class Layer(Protocol):
    """Attributes that both layers have."""

    is_causal: bool
    local_window_size: int | Window | None
    logits_soft_cap: float | None
    scale: float | None
    padding_segment_id: int | None
    rotary_base: float | None
    deterministic_backward: bool
    precision: Any
    dropout_rate: float
    deterministic: bool | None
    implementation: Implementations | None
    attention_fn: Callable[..., Any]


def check_heads(
    num_heads: int, num_kv_heads: int | None, qkv_features: int, rotary_base: float | None
) -> tuple[int, int]:
    """(K, H) of a layer with these sizes."""
    if num_heads < 1 or qkv_features % num_heads:
        raise wrong("qkv_features", qkv_features, f"a multiple of num_heads = {num_heads}")
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise wrong("num_kv_heads", num_kv_heads, f"a divisor of num_heads = {num_heads}")
    head_dim = qkv_features // num_heads
    if rotary_base is not None:
        if static_float("rotary_base", rotary_base) <= 0:
            raise wrong("rotary_base", rotary_base, "a float > 0, such as 10000")
        if head_dim % 2:
            wanted = "an even one for rotary embeddings: change qkv_features or num_heads"
            raise wrong("rotary_base", f"head dim {head_dim}", wanted)
    return num_kv_heads, head_dim


def checked_inputs(inputs_q: Any, inputs_k: Any, inputs_v: Any) -> tuple[Array, Array, Array]:
    """The inputs of the three projections, by Flax's rules."""
    if inputs_k is None and inputs_v is not None:
        raise wrong(
            "inputs_k", None, "an array where inputs_v is one: pass inputs_k alone for both"
        )
    inputs_q = array("inputs_q", inputs_q)
    inputs_k = inputs_q if inputs_k is None else array("inputs_k", inputs_k)
    inputs_v = inputs_k if inputs_v is None else array("inputs_v", inputs_v)
    if inputs_q.ndim not in (2, 3):
        raise wrong("inputs_q", f"shape {inputs_q.shape}", "(B, T, features), or (T, features)")
    for name, x in (("inputs_k", inputs_k), ("inputs_v", inputs_v)):
        if x.ndim != inputs_q.ndim:
            raise wrong(name, f"shape {x.shape}", f"rank {inputs_q.ndim}, as inputs_q has")
    return inputs_q, inputs_k, inputs_v


def documented(call: _Function) -> _Function:
    """A layer's __call__, with the docstring that both layers have."""
    call.__doc__ = _CALL
    return call


_CALL = """Attention of inputs_q to inputs_k and inputs_v; either defaults to the one before it.

Args:
    inputs_q, inputs_k, inputs_v: [B, T, features], [B, S, ...], [B, S, ...], or without B.
    positions: integers [B, T] or [T] for rotary_base; default 0, 1, 2 ..., and in decoding
        on from what the cache holds.
    decode: of nnx alone; None is what the layer was made with.
    deterministic: True for no dropout; None is what the layer was made with.
    rngs: of nnx alone, whose stream "dropout" gives the key; linen takes it from its own.
    masks: query_seq_lengths, key_value_seq_lengths, query_segment_ids,
        key_value_segment_ids, query_offset, key_begin and key_end, as in
        `jax_fa3.dot_product_attention`. Decoding takes the last two only, as positions in
        the cache: key_begin hides padding at the left.

Returns:
    [B, T, out_features]. Rows that see no key give the output projection of 0. Decoding
    past the cache's end raises, but under jit, where cache_index is not known, it gives NaN.

Raises:
    ValueError: sizes that do not fit; decoding without a cache or past its end.
    NotImplementedError: as `jax_fa3.dot_product_attention`.
"""


def attend(
    layer: Layer,
    query: Array,
    key: Array,
    value: Array,
    positions: Integers | None,
    masks: MaskArrays,
    cache: Cache | None = None,
    **options: Any,
) -> tuple[Array, Cache | None]:
    """The layer from projection to projection: [..., T, N, H], and the cache with these T keys; options:
    sinks and dropout, as attention has them.

    With a cache the rows are the T positions after those that it holds, and see causally what it
    holds and themselves. If it has no room for them: ValueError, or under jit, where cache_index is
    not known, NaN in all of this and every later call's rows.
    """
    unknown = masks.keys() - MaskArrays.__annotations__.keys()
    if unknown:
        wanted = f"one of {', '.join(MaskArrays.__annotations__)}"
        if "mask" in unknown:
            wanted = "key_begin and key_end: jax_fa3.flax.mask_to_intervals(mask) gives both"
        raise TypeError(f"{min(unknown)}: not an argument of this layer, wanted {wanted}")
    if cache is not None:
        _cache.check(layer, query, key, value, masks, cache)
    if layer.rotary_base is not None:
        start = 0 if cache is None else cache.cache_index
        where = _positions(positions, query, key, start)
        query, key = (rotate(x, where, layer.rotary_base) for x in (query, key))
    elif positions is not None:
        raise wrong("positions", "an array", "None, as the layer has rotary_base=None")
    query, key, value = map(checkpoint_name, (query, key, value), PROJECTION_NAMES)

    arguments: dict[str, Any] = {
        "is_causal": layer.is_causal,
        "local_window_size": layer.local_window_size,
        "logits_soft_cap": layer.logits_soft_cap,
        "scale": layer.scale,
        "deterministic_backward": layer.deterministic_backward,
        "implementation": layer.implementation,
        **options,
        **masks,
    }
    if masks.get("query_segment_ids") is not None:
        arguments["padding_segment_id"] = layer.padding_segment_id
    with matmul_precision(layer.precision):
        if cache is None:
            return _cache.call(layer.attention_fn, query, key, value, arguments), None
        return _cache.step(layer, query, key, value, arguments, cache)


def rotate(x: Array, positions: Integers, base: float) -> Array:
    """Rotary position embedding (Su et al., arXiv 2104.09864), in the form that rotates halves.

    Args:
        x: [..., T, N, H], H even.
        positions: integers [..., T] or [T].
        base: of the wavelengths; 10000 in the paper.

    Returns x's shape and dtype; the angles are in fp32.
    """
    half = x.shape[-1] // 2
    frequencies = base ** -(jnp.arange(half, dtype=jnp.float32) / half)
    where = jnp.asarray(positions, jnp.float32)
    where = where.reshape(*[1] * (x.ndim - 2 - where.ndim), *where.shape, 1, 1)
    angles = where * frequencies.reshape(*[1] * (x.ndim - 1), half)  # [..., T, 1, H/2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _positions(positions: Integers | None, query: Array, key: Array, start: int | Array) -> Array:
    """Of the rows, [T] or [B, T]."""
    *batch, length, _, _ = query.shape
    if length != key.shape[-3]:
        found = f"{length} queries and {key.shape[-3]} keys"
        raise wrong("inputs_k", found, "as many of both: rotary_base is for self-attention")
    if positions is None:
        return start + jnp.arange(length, dtype=jnp.int32)
    positions = array("positions", positions)
    if positions.shape not in ((length,), (*batch, length)):
        raise wrong("positions", f"shape {positions.shape}", f"{(length,)} or {(*batch, length)}")
    return positions
