"""Flax's masks, which are arrays, as this library's, which are one interval of keys per row."""

from __future__ import annotations

from jax import Array
from jax.typing import ArrayLike

from .._broken import marked
from .._checks import array, wrong
from .._dense_mask import intervals


def mask_to_intervals(mask: ArrayLike) -> tuple[Array, Array]:
    """The keys that each row of a mask sees, for masks in which they are one interval.

    Such are the results of flax.linen.make_causal_mask, of make_attention_mask for padding left or
    right, of combine_masks of the two, and the masks with which Flax's layers decode.

    Args:
        mask: [..., 1, T, S] as Flax has it: bool, or numbers 0 and 1; 0 hides. T may be 1 to stand
            for every row.

    Returns:
        key_begin, key_end: int32 [..., T], to be passed to `dot_product_attention` by name. Row i
        sees the keys in [key_begin[i], key_end[i]); 0, 0 where it sees none: it gives 0, unlike in
        Flax, which gives the mean of all values. A row that sees several intervals, or has another
        number than 0 and 1, gets the pair that `jax_fa3.key_intervals` reserves, which makes its output
        NaN, and its query's gradient where its cotangents are not 0.

    Raises:
        ValueError: the mask has less than three axes, or differs from head to head.
    """
    mask = array("mask", mask)
    if mask.ndim < 3 or mask.shape[-3] != 1:
        raise wrong("mask", f"shape {mask.shape}", "[..., 1, T, S], one mask for all heads")
    mask = mask[..., 0, :, :]
    begin, end, broken = intervals(mask != 0)
    if mask.dtype != bool:
        broken |= ((mask != 0) & (mask != 1)).any(-1)
    return marked(broken, begin, end)
