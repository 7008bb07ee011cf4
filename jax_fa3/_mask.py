"""Masks as key intervals: query row i sees the keys in [begin[i], end[i]).

Every mask but a dense one and several intervals a row (_mask_bits.py) is one such interval per row:
causal, window, lengths, segments, per-row arrays. They combine by intersecting intervals. Positions,
offsets and windows behave as exact integers would, though all arrays are int32 and jax_enable_x64 is not needed.
"""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _dispatch, _ffi
from ._arguments import MaskArguments, parse_masks
from ._broken import is_broken, marked
from ._checks import natural
from ._integers import INT32_MAX, count_while, narrow_ids, saturating_add
from ._problem import Implementation, Implementations, Masks, SegmentIds, Sizes, Window
from ._varying import vary_together


def intersect(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """The keys in both intervals, elementwise; a broken interval stays broken."""
    broken = is_broken(*a) | is_broken(*b)
    return marked(broken, jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1]))


def _window_edge(rows: Array, offset: Array, distance: int) -> Array:
    """rows + offset + distance, clamped to int32; rows >= 0."""
    edge = saturating_add(offset, distance)
    return rows + jnp.minimum(edge, INT32_MAX - rows)


def row_intervals(
    masks: Masks,
    window: Window,
    batch: int,
    query_length: int,
    key_length: int,
    rows: Array | None = None,
) -> tuple[Array, Array, Array]:
    """All of a call's masks as one interval per query row.

    Args:
        masks: the run-time arrays; any int32 values are in order.
        window: (left, right), Python ints of any size or sign: row i sees key j only if
            i + query_offset - left <= j <= i + query_offset + right. None: unbounded.
        batch, query_length, key_length, rows: B, T, S, and the rows' positions if not 0, 1, 2 ...

    Returns:
        begin, end: int32 [B, T] with 0 <= begin < end <= S, or 0, 0 for a row that sees no key.
        broken: bool [B, T], the rows whose segment is broken; they see no key.
    """
    rows = jnp.arange(query_length, dtype=jnp.int32) if rows is None else rows
    rows = rows[None]  # [1, T]
    offset = jnp.zeros(1, jnp.int32) if masks.query_offset is None else masks.query_offset
    offset = offset[:, None]  # [B or 1, 1]
    left, right = window

    begin = jnp.zeros((1, 1), jnp.int32)
    end = jnp.full((1, 1), key_length, jnp.int32)
    if left is not None:
        begin = jnp.maximum(begin, _window_edge(rows, offset, -left))
    if right is not None:
        end = jnp.minimum(end, _window_edge(rows, offset, right + 1))
    if masks.key_value_seq_lengths is not None:
        end = jnp.minimum(end, masks.key_value_seq_lengths[:, None])
    if masks.key_begin is not None:
        begin = jnp.maximum(begin, masks.key_begin)
    if masks.key_end is not None:
        end = jnp.minimum(end, masks.key_end)

    broken = jnp.zeros((1, 1), bool)
    if masks.key_begin is not None and masks.key_end is not None:
        broken = is_broken(masks.key_begin, masks.key_end)
    sees = begin < end
    if masks.query_seq_lengths is not None:
        inside = rows < masks.query_seq_lengths[:, None]
        sees, broken = sees & inside, broken & inside
    begin, end = jnp.where(sees, begin, 0), jnp.where(sees, end, 0)
    begin, end, broken = (jnp.broadcast_to(x, (batch, query_length)) for x in (begin, end, broken))
    return begin, end, broken


def segment_intervals(
    query_segment_ids: Array, key_value_segment_ids: Array
) -> tuple[Array, Array]:
    """The run of keys with each query row's segment id, in plain JAX, memory linear in T and S.

    Args:
        query_segment_ids: int32 [B, T], in any order; negative ids see no key.
        key_value_segment_ids: int32 [B, S]; each id >= 0 should be one contiguous run, the runs
            in any order; nobody sees the keys of negative ids.

    Returns:
        key_begin, key_end: int32 [B, T]; 0, 0 where the id is negative or not among the keys,
        _broken's mark where its keys are not one contiguous run.
    """

    def one_entry(query_ids: Array, key_ids: Array) -> tuple[Array, Array]:
        key_ids = jnp.append(key_ids, jnp.int32(-1))  # so that there always is a key to gather
        order = jnp.argsort(key_ids, stable=True).astype(jnp.int32)  # ascending within an id
        sorted_ids = key_ids[order]
        low = count_while(lambda i: sorted_ids[i] < query_ids, query_ids, sorted_ids.shape[0])
        high = count_while(lambda i: sorted_ids[i] <= query_ids, query_ids, sorted_ids.shape[0])
        begin = order.at[low].get(mode="clip")
        end = order.at[high - 1].get(mode="clip") + 1
        found = (query_ids >= 0) & (low < high)
        broken = found & (end - begin != high - low)
        return marked(broken, jnp.where(found, begin, 0), jnp.where(found, end, 0))

    return jax.vmap(one_entry)(*vary_together((query_segment_ids, key_value_segment_ids)))


def with_segments(
    masks: Masks, segment_ids: SegmentIds, implementation: Implementation | None
) -> Masks:
    """The masks, and that rows see keys of their own segment only, in key_begin and key_end.

    Args:
        implementation: what _dispatch.choose gave.
    """
    functions, letters = (_ffi.segment_intervals, segment_intervals), ("b.", "b.")
    ids = narrow_ids(segment_ids)
    intervals: Any = _dispatch.run(implementation, *functions, (), letters, letters, *ids)
    begin, end = masks.key_begin, masks.key_end
    if begin is not None or end is not None:  # else nothing stands between the two kernels
        begin = jnp.zeros_like(intervals[0]) if begin is None else begin
        end = jnp.full_like(intervals[1], INT32_MAX) if end is None else end
        intervals = intersect(intervals, (begin, end))
    return masks._replace(key_begin=intervals[0], key_end=intervals[1])


def key_intervals(
    query_length: int,
    key_length: int,
    *,
    batch: int | None = None,
    implementation: Implementations | None = None,
    **arguments: Unpack[MaskArguments],
) -> tuple[Array, Array]:
    """All masks of a call as two arrays, to be computed once per step and not in every layer.

    Passing only the result, as `key_begin` and `key_end`, to `dot_product_attention` masks exactly
    what passing the arguments given here would.

    Args:
        query_length, key_length: T and S.
        batch: B; None takes it from the arguments that have a batch axis.
        implementation: converts segment ids by the CUDA kernel ("fa3"), in plain JAX ("xla"), or by
            whichever `dot_product_attention` would choose (None, or a sequence).
        arguments: is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size,
            query_offset, query_segment_ids, key_value_segment_ids, padding_segment_id, key_begin and
            key_end, as in `dot_product_attention`.

    Returns:
        key_begin, key_end: int32 [B, T], or [T] if batch is None and no argument has a batch axis.
        Row i sees the keys in [key_begin[i], key_end[i]), 0 <= key_begin[i] < key_end[i] <= S; a
        row that sees none has 0, 0; one whose segment id is not one contiguous run among the keys
        has the reserved pair 0x7FFA3FA3, -0x7FFA3FA3, which makes its output NaN. No other pair of
        integers is reserved: any with key_begin[i] >= key_end[i] is a row that sees no key.

    Raises:
        ValueError: an argument has the wrong type, shape or value.
        NotImplementedError: implementation is "fa3" and this machine's GPU cannot run the kernel.
    """
    wanted = _dispatch.checked_implementation(implementation)
    query_length = _length("query_length", query_length)
    key_length = _length("key_length", key_length)
    per_entry = "query_offset", "query_seq_lengths", "key_value_seq_lengths"  # [B]
    per_row = "query_segment_ids", "key_value_segment_ids", "key_begin", "key_end"  # [B, ...]
    shapes = [_shape(arguments.get(name)) for name in per_entry]
    shapes += [_shape(arguments.get(name))[:-1] for name in per_row]
    batches = [
        _length("batch", x)
        for x in (batch, *(shape[0] for shape in shapes if shape))
        if x is not None
    ]
    sizes = Sizes(batches[0] if batches else 1, query_length, key_length, 0, 0, 0, 0)
    masks, window, segment_ids = parse_masks(sizes, bool(batches), **arguments)
    if segment_ids is not None:
        masks = with_segments(masks, segment_ids, _dispatch.choose(wanted))
    begin, end, broken = row_intervals(masks, window, *sizes[:3])
    begin, end = marked(broken, begin, end)
    return (begin, end) if batches else (begin[0], end[0])


def _shape(x: Any) -> tuple[int, ...]:
    try:
        return np.shape(x)
    except ValueError:  # rows of unequal lengths, which parse_masks refuses by name
        return ()


def _length(name: str, x: Any) -> Any:
    """x, an int >= 0 or a symbolic size of jax.export."""
    return x if jax.export.is_symbolic_dim(x) else natural(name, x)
