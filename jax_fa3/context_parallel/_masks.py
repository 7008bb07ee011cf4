"""The masks of one device's rows, as intervals of positions in the whole sequence of keys."""

from __future__ import annotations

import dataclasses

from jax import Array

from .. import _mask
from .._broken import is_broken, marked
from .._problem import Implementation, Masks, SegmentIds, Sizes, Window
from ._layout import Layout


def of_this_device(
    implementation: Implementation | None,
    layout: Layout,
    masks: Masks,
    window: Window,
    segment_ids: SegmentIds | None,
    sizes: Sizes,
) -> Masks:
    """Everything in key_begin and key_end [B, T], but the lengths.

    Args:
        masks, window: of the whole sequence; the arrays [B, T] of the rows of this device.
        segment_ids: of this device's rows, and of its keys.
        sizes: of one device.

    Returns:
        Masks whose key_begin, key_end and key_value_seq_lengths count keys of the whole sequence,
        and whose query_seq_lengths count rows of this device.
    """
    if segment_ids is not None:
        # All keys' ids, 4 bytes each: a segment may span devices.
        ids = dataclasses.replace(segment_ids, key=layout.gather(segment_ids.key))
        masks = _mask.with_segments(masks, ids, implementation)
    if masks.query_seq_lengths is not None:
        lengths = layout.rows_before(masks.query_seq_lengths, layout.device(), sizes.query_length)
        masks = masks._replace(query_seq_lengths=lengths)
    if window == (None, None) and masks.key_begin is None and masks.key_end is None:
        return masks
    begin, end, broken = _mask.row_intervals(
        masks._replace(query_seq_lengths=None, key_value_seq_lengths=None),
        window,
        sizes.batch,
        sizes.query_length,
        layout.size * sizes.key_length,
        layout.positions(sizes.query_length),
    )
    begin, end = marked(broken, begin, end)
    return masks._replace(query_offset=None, key_begin=begin, key_end=end)


def of_one_part(layout: Layout, masks: Masks, device: Array, key_length: int) -> Masks:
    """What of_this_device gave, for the keys of `device` alone: all counts are of its keys.

    One interval per row again, in zigzag order too: see Layout.
    """

    def local(positions: Array) -> Array:
        return layout.rows_before(positions, device, key_length)

    lengths, begin, end = masks.key_value_seq_lengths, masks.key_begin, masks.key_end
    if lengths is not None:
        lengths = local(lengths)
    if begin is not None and end is not None:  # both, or neither
        begin, end = marked(is_broken(begin, end), local(begin), local(end))
    return masks._replace(key_value_seq_lengths=lengths, key_begin=begin, key_end=end)
