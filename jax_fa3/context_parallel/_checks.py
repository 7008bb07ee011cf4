"""What context parallelism cannot take, refused at trace time."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from .._checks import wrong
from .._problem import Sizes
from .._varying import varying
from ._layout import Layout


def axis_size(axis_name: Any, sharding: NamedSharding | PartitionSpec | None) -> int:
    """The devices along the axis, of the sharding's mesh or of shard_map's."""
    if not isinstance(axis_name, str):
        raise wrong("axis_name", repr(axis_name), "the name of one mesh axis")
    if sharding is not None:
        if not isinstance(sharding, NamedSharding):
            raise wrong("sharding", repr(sharding), "a NamedSharding")
        if axis_name not in sharding.mesh.shape:
            wanted = f"an axis of sharding's mesh {dict(sharding.mesh.shape)}"
            raise wrong("axis_name", repr(axis_name), wanted)
        return sharding.mesh.shape[axis_name]
    try:
        return lax.axis_size(axis_name)
    except NameError:  # JAX's answer where no such axis is manual
        manual = jax.sharding.get_abstract_mesh().manual_axes
        wanted = (
            f"an axis that is manual here (those are {manual}), inside jax.shard_map; or sharding"
        )
        raise wrong("axis_name", repr(axis_name), wanted) from None


def check_lengths(layout: Layout, sizes: Sizes, *, devices: int = 1) -> None:
    """That the lengths, of this many devices, can be split over them, and into chunks."""
    chunks = devices * (2 if layout.zigzag else 1)
    for name, length in (("query", sizes.query_length), ("key", sizes.key_length)):
        over = f"the {layout.size} devices of axis {layout.axis_name!r}"
        if length % chunks or not length:
            order = " in zigzag order, two chunks each" if layout.zigzag else ""
            raise wrong(
                name, f"length {length}", f"a positive multiple of {chunks} for {over}{order}"
            )
        if length // devices * layout.size >= 2**31:
            raise wrong(name, f"length {length}", f"less than 2**31 positions on {over}")


def check_replication(layout: Layout, tensors: tuple[Array, ...]) -> None:
    """That not some of query, key and value are known, by check_vma, to be the same everywhere."""
    names = "query", "key", "value"
    varies = [layout.axis_name in varying(x) for x in tensors]
    if any(varies) and not all(varies):
        split, same = names[varies.index(True)], names[varies.index(False)]
        found = (
            f"an array that is the same on the {layout.size} devices of axis {layout.axis_name!r}"
        )
        raise wrong(same, found, f"each device's own part, as {split} is")
