"""The user's arguments checked at trace time, from shapes, dtypes and static values alone.

Every error names the argument, the value found and the value wanted. What no implementation can
take is refused here with a ValueError; what only the kernels cannot take, _dispatch refuses.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypedDict

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ._checks import (
    Integers,
    int32,
    integer,
    natural,
    score_scale,
    soft_cap,
    static_bool,
    static_sharding,
    wrong,
)
from ._problem import Masks, Sizes, Window, fold_window

Implementation = Literal["fa3", "xla"]


class Options(TypedDict, total=False):
    """The keyword arguments that all public functions share, spelled out for type checkers."""

    scale: ArrayLike | None
    is_causal: bool
    query_seq_lengths: Integers | None
    key_value_seq_lengths: Integers | None
    local_window_size: int | tuple[int, int] | None
    query_offset: Integers
    query_segment_ids: Integers | None
    key_value_segment_ids: Integers | None
    key_begin: Integers | None
    key_end: Integers | None
    logits_soft_cap: float | None
    deterministic_backward: bool
    implementation: Implementation | None
    sharding: NamedSharding | PartitionSpec | None


@dataclasses.dataclass(frozen=True)
class Call:
    """One call's checked arguments, all but query, key and value."""

    sizes: Sizes
    batched: bool  # whether the arguments have a batch axis
    scale: float | Array
    window: Window
    logits_soft_cap: float | None
    deterministic_backward: bool
    masks: Masks
    segment_ids: tuple[Array, Array] | None  # of the queries and of the keys
    bias: Array | None  # [B or 1, N or 1, T or 1, S or 1], and so is mask
    mask: Array | None
    implementation: Implementation | None
    sharding: NamedSharding | PartitionSpec | None
    return_residual: bool


def operands(
    query: ArrayLike, key: ArrayLike, value: ArrayLike
) -> tuple[tuple[Array, Array, Array], Sizes, bool]:
    """(query, key, value) with a batch axis, their sizes, and whether they had that axis."""
    q, k, v = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    if q.ndim not in (3, 4):
        raise wrong("query", f"shape {q.shape}", "(B, T, N, H), or (T, N, H)")
    _check_float("query", q)
    for name, x in (("key", k), ("value", v)):
        if x.ndim != q.ndim:
            raise wrong(name, f"shape {x.shape}", f"rank {q.ndim}, as query {q.shape} has")
        if x.dtype != q.dtype:
            raise wrong(name, f"dtype {x.dtype}", f"{q.dtype}, as query has")
    *entries, _, _, head_dim = q.shape
    if [*k.shape[:-3], k.shape[-1]] != [*entries, head_dim]:
        shape = ", ".join(map(str, [*entries, "S", "K", head_dim]))
        raise wrong("key", f"shape {k.shape}", f"({shape}) to go with query {q.shape}")
    if v.shape[:-1] != k.shape[:-1]:
        shape = ", ".join(map(str, [*k.shape[:-1], "V"]))
        raise wrong("value", f"shape {v.shape}", f"({shape}) to go with key {k.shape}")
    batched = q.ndim == 4
    if not batched:
        q, k, v = q[None], k[None], v[None]
    batch, query_length, num_heads, _ = q.shape
    _, key_length, num_kv_heads, head_dim_v = v.shape
    sizes = Sizes(batch, query_length, key_length, num_heads, num_kv_heads, head_dim, head_dim_v)
    _check_heads("query", sizes)
    return (q, k, v), sizes, batched


def packed_operand(qkv: ArrayLike, num_kv_heads: int | None) -> tuple[Array, Sizes, bool]:
    """qkv as [B, T, 3, N, H] or [B, T, N + 2K, H], its sizes, and whether it had a batch axis."""
    x = jnp.asarray(qkv)
    _check_float("qkv", x)
    if num_kv_heads is None:
        if x.ndim not in (4, 5) or x.shape[-3] != 3:
            wanted = "(B, T, 3, N, H), or (T, 3, N, H), as num_kv_heads is None"
            raise wrong("qkv", f"shape {x.shape}", wanted)
        batched = x.ndim == 5
        num_heads = num_kv_heads = x.shape[-2]
    elif x.ndim not in (3, 4):
        wanted = "(B, T, N + 2K, H), or (T, N + 2K, H), as num_kv_heads is given"
        raise wrong("qkv", f"shape {x.shape}", wanted)
    else:
        num_kv_heads = natural("num_kv_heads", num_kv_heads)
        batched, heads = x.ndim == 4, x.shape[-2]
        num_heads = heads - 2 * num_kv_heads
        if num_heads < 0:
            raise wrong("qkv", f"{heads} heads", f"at least 2 * num_kv_heads = {2 * num_kv_heads}")
    x = x if batched else x[None]
    batch, length, head_dim = *x.shape[:2], x.shape[-1]
    sizes = Sizes(batch, length, length, num_heads, num_kv_heads, head_dim, head_dim)
    _check_heads("qkv", sizes)
    return x, sizes, batched


def parse(
    sizes: Sizes,
    batched: bool,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    deterministic_backward: bool = False,
    implementation: Implementation | None = None,
    sharding: NamedSharding | PartitionSpec | None = None,
    return_residual: bool = False,
    **mask_arguments: Any,
) -> Call:
    """Everything but the operands, checked; mask_arguments are those of parse_masks."""
    if implementation not in (None, "fa3", "xla"):
        raise wrong("implementation", repr(implementation), "None, 'fa3' or 'xla'")
    masks, window, segment_ids = parse_masks(sizes, batched, **mask_arguments)
    return Call(
        sizes,
        batched,
        score_scale(scale, sizes.head_dim),
        window,
        soft_cap(logits_soft_cap),
        static_bool("deterministic_backward", deterministic_backward),
        masks,
        segment_ids,
        _dense("bias", bias, sizes),
        _dense("mask", mask, sizes),
        implementation,
        static_sharding("sharding", sharding, batched),
        static_bool("return_residual", return_residual),
    )


def parse_masks(
    sizes: Sizes,
    batched: bool,
    *,
    is_causal: bool = False,
    query_seq_lengths: Integers | None = None,
    key_value_seq_lengths: Integers | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_offset: Integers = 0,
    query_segment_ids: Integers | None = None,
    key_value_segment_ids: Integers | None = None,
    key_begin: Integers | None = None,
    key_end: Integers | None = None,
) -> tuple[Masks, Window, tuple[Array, Array] | None]:
    """(masks, window, segment ids): who sees whom. Of sizes only B, T and S count; the caller turns
    the segment ids, if there are any, into intervals."""
    batch, query_length, key_length = sizes[:3]

    def array(name: str, x: Integers | None, *shape: int) -> Array | None:
        return None if x is None else int32(name, x, shape, batched)

    static_offset, offset = _offset(query_offset, batch, batched)
    causal = static_bool("is_causal", is_causal)
    window = fold_window(_window_size(local_window_size), causal, static_offset)
    if window == (None, None):  # then nothing depends on the offset
        offset = None
    query_ids = array("query_segment_ids", query_segment_ids, batch, query_length)
    key_ids = array("key_value_segment_ids", key_value_segment_ids, batch, key_length)
    if (query_ids is None) != (key_ids is None):
        absent = "query_segment_ids" if query_ids is None else "key_value_segment_ids"
        raise wrong(absent, None, "both query_segment_ids and key_value_segment_ids, or neither")
    masks = Masks(
        offset,
        array("query_seq_lengths", query_seq_lengths, batch),
        array("key_value_seq_lengths", key_value_seq_lengths, batch),
        array("key_begin", key_begin, batch, query_length),
        array("key_end", key_end, batch, query_length),
    )
    return masks, window, None if query_ids is None or key_ids is None else (query_ids, key_ids)


def _check_float(name: str, x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise wrong(name, f"dtype {x.dtype}", "a floating dtype such as bfloat16")


def _check_heads(name: str, sizes: Sizes) -> None:
    heads, kv_heads = sizes.num_heads, sizes.num_kv_heads
    if heads % kv_heads if kv_heads else heads:
        raise wrong(name, f"{heads} query heads", f"a multiple of the {kv_heads} key/value heads")
    if not (sizes.head_dim and sizes.head_dim_v):
        raise wrong(name, f"head dims {sizes.head_dim}, {sizes.head_dim_v}", "at least 1")


def _window_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    left, right = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
    return natural("local_window_size", left), natural("local_window_size", right)


def _offset(offset: Any, batch: int, batched: bool) -> tuple[int | None, Array | None]:
    """Either a static offset, or one that is known at run time, as int32 [1] or [B]."""
    if np.ndim(offset) > 0:
        return None, int32("query_offset", offset, (batch,), batched)
    if isinstance(offset, Array):
        return None, int32("query_offset", offset, (), True).reshape(1)
    return integer("query_offset", offset), None


def _dense(name: str, x: ArrayLike | None, sizes: Sizes) -> Array | None:
    """jax.nn's bias or mask with four axes."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if name == "bias":
        _check_float(name, x)
    elif x.dtype != bool:
        raise wrong(name, f"dtype {x.dtype}", "bool; an additive mask is a bias")
    full = sizes.batch, sizes.num_heads, sizes.query_length, sizes.key_length
    shape = (1,) * (4 - x.ndim) + x.shape
    if x.ndim > 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise wrong(name, f"shape {x.shape}", f"one that broadcasts to (B, N, T, S) = {full}")
    return x.reshape(shape)
