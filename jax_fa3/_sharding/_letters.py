"""Which mesh axes the letters of a call may have. Axes are names, in order from major to minor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from jax import Array
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
        found |= {letter: n for letter, n in zip(dims, x.shape, strict=True) if letter != "."}
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


def undistinguished(dims: str) -> str:
    """With a dot for each letter whose dimension must be whole."""
    return dims.replace("t", ".").replace("h", ".")


def spec(dims: str, by_letter: Mapping[str, Axes]) -> PartitionSpec:
    return PartitionSpec(*(by_letter.get(letter) or None for letter in dims))
