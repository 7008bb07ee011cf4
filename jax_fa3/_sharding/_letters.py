"""Which mesh axes the letters of a call may have. Axes are names, in order from major to minor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from jax import Array, lax
from jax.sharding import PartitionSpec

Axes = tuple[str, ...]
ByLetter = dict[str, Axes]

CONTEXT_PARALLEL = (
    "to split a sequence over devices use jax_fa3.context_parallel.dot_product_attention"
)


def sizes(operands: Iterable[Array], letters: Iterable[str]) -> dict[str, int]:
    """The size of each letter but the dot."""
    found = {}
    for x, dims in zip(operands, letters, strict=True):
        pairs = zip(dims, x.shape, strict=True)
        found |= {letter: n for letter, n in pairs if letter not in ".+"}
    return found


def split_kv_heads(
    axes: Axes, axis_sizes: Mapping[str, int], num_kv_heads: int
) -> tuple[Axes, Axes]:
    """(the axes that split the key/value heads, the axes whose devices share them), where the query
    heads are split over all of them: as many of the major axes as divide the heads."""
    count = len(axes)
    while num_kv_heads % math.prod(axis_sizes[axis] for axis in axes[:count]):
        count -= 1
    return axes[:count], axes[count:]


def summed(x: Array, dims: str, axes: Mapping[str, Axes]) -> Array:
    """A device's part of a result, added up over those that split what its dimensions of + are sums
    over: the first over the batch, the second over query heads."""
    of = [axes.get(letter, ()) for letter, mark in zip("bn", dims, strict=False) if mark == "+"]
    names = tuple(axis for axes in of for axis in axes)
    return lax.psum(x.astype("float32"), names).astype(x.dtype) if names else x


def undistinguished(dims: str) -> str:
    """With a dot for each letter whose dimension must be whole."""
    return dims.replace("t", ".").replace("h", ".")


def spec(dims: str, by_letter: Mapping[str, Axes]) -> PartitionSpec:
    return PartitionSpec(*(by_letter.get(letter) or None for letter in dims))
