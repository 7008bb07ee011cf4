"""The user's arguments checked at trace time, from shapes, dtypes and static values alone.

Every error names the argument, the value found and the value wanted. What no implementation can
take is refused here with a ValueError; what only the kernels cannot take, _dispatch refuses.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ._checks import (
    Integers,
    array,
    check_floating,
    checked_segment_ids,
    dense,
    integers,
    natural,
    offset_of,
    score_scale,
    soft_cap,
    static_bool,
    static_sharding,
    window_size,
    wrong,
)
from ._integers import clamped, offset_and_window
from ._integers import segment_ids as known_to_fit
from ._problem import Masks, SegmentIds, Sizes, Window, fold_window

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
    padding_segment_id: int | None
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
    segment_ids: SegmentIds | None
    bias: Array | None  # [B or 1, N or 1, T or 1, S or 1], and so is mask
    mask: Array | None
    implementation: Implementation | None
    sharding: NamedSharding | PartitionSpec | None
    return_residual: bool

    def results(self, out: Array, lse: Array | None = None) -> Any:
        """What the user asked for, of out [B, T, N, V] and, with return_residual, lse [B, N, T]."""
        found = out if lse is None else (out, jnp.swapaxes(lse, 1, 2))
        return found if self.batched else jax.tree.map(lambda x: x[0], found)


def operands(
    query: ArrayLike, key: ArrayLike, value: ArrayLike
) -> tuple[tuple[Array, Array, Array], Sizes, bool]:
    """(query, key, value) with a batch axis, their sizes, and whether they had that axis."""
    q, k, v = array("query", query), array("key", key), array("value", value)
    if q.ndim not in (3, 4):
        raise wrong("query", f"shape {q.shape}", "(B, T, N, H), or (T, N, H)")
    check_floating("query", q)
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
    x = array("qkv", qkv)
    check_floating("qkv", x)
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
    full = sizes.batch, sizes.num_heads, sizes.query_length, sizes.key_length
    return Call(
        sizes,
        batched,
        score_scale(scale, sizes.head_dim),
        window,
        soft_cap(logits_soft_cap),
        static_bool("deterministic_backward", deterministic_backward),
        masks,
        segment_ids,
        dense("bias", bias, full),
        dense("mask", mask, full),
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
    padding_segment_id: int | None = None,
    key_begin: Integers | None = None,
    key_end: Integers | None = None,
) -> tuple[Masks, Window, SegmentIds | None]:
    """(masks, window, segment ids): who sees whom. Of sizes only B, T and S count; the caller turns
    the segment ids, if there are any, into intervals."""
    batch, query_length, key_length = sizes[:3]

    def given(name: str, x: Integers | None, *shape: int) -> Array | np.ndarray | None:
        return None if x is None else integers(name, x, shape, batched)

    def bound(name: str, x: Integers | None, *shape: int) -> Array | None:
        found = given(name, x, *shape)
        return None if found is None else clamped(found)

    static_offset, offset = offset_of(query_offset, batch, batched)
    causal = static_bool("is_causal", is_causal)
    window = fold_window(window_size(local_window_size), causal, static_offset)
    if offset is None or window == (None, None):  # then nothing depends on the offset
        narrow_offset = None
    else:
        narrow_offset, window = offset_and_window(offset, window)
    query_ids = given("query_segment_ids", query_segment_ids, batch, query_length)
    key_ids = given("key_value_segment_ids", key_value_segment_ids, batch, key_length)
    ids = checked_segment_ids(query_ids, key_ids, padding_segment_id)
    masks = Masks(
        narrow_offset,
        bound("query_seq_lengths", query_seq_lengths, batch),
        bound("key_value_seq_lengths", key_value_seq_lengths, batch),
        bound("key_begin", key_begin, batch, query_length),
        bound("key_end", key_end, batch, query_length),
    )
    return masks, window, None if ids is None else known_to_fit(*ids)


def _check_heads(name: str, sizes: Sizes) -> None:
    heads, kv_heads = sizes.num_heads, sizes.num_kv_heads
    if heads % kv_heads if kv_heads else heads:
        raise wrong(name, f"{heads} query heads", f"a multiple of the {kv_heads} key/value heads")
    if not (sizes.head_dim and sizes.head_dim_v):
        raise wrong(name, f"head dims {sizes.head_dim}, {sizes.head_dim_v}", "at least 1")
