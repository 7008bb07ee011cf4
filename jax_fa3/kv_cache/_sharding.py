"""One letter per dimension of the arrays of a call, as jax_fa3._sharding has them: b, n, k, dots."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from .._checks import wrong
from .._values import static_sharding
from ._arguments import Call

Sharding = NamedSharding | PartitionSpec | None


class Letters:
    """Those of one call. The rows of a ragged call are whole, and all that goes with them."""

    def __init__(self, call: Call, sharding: Sharding):
        self.batch = "b" if len(call.shape) == 2 else "."
        self._heads_second = call.layout.kind == "HND"
        own = call.where.table is None  # row b of the cache is sequence b's
        split = sharding is not None or any(_split(x, 0) for x in call.caches)
        self.pages = self.batch if own or split else "."
        self.caches = tuple(self._cache(x.ndim) for x in call.caches)
        where = call.where
        self.where = where._make(
            [
                self.batch,
                None if own else self.batch + ".",
                None if where.starts is None else ".",
                None if where.num_sequences is None else "",
            ]
        )

    def _cache(self, rank: int) -> str:
        return self.pages + (
            "k" + "." * (rank - 2) if self._heads_second else ".k" + "." * (rank - 3)
        )

    def rows(self, heads: str) -> str:
        """Of [B, T, heads, D] or [rows, heads, D]."""
        return f"b.{heads}." if self.batch == "b" else f".{heads}."

    def per_row(self, x: Array | None) -> str | None:
        """Of [B, T], [rows] or [B]."""
        return None if x is None else self.batch + "." * (x.ndim - 1)

    def scale(self, x: Array | None) -> str | None:
        if x is None:
            return None
        return ("", "k", self.batch + "k")[x.ndim] if x.ndim < 3 else self._cache(x.ndim)


def checked_sharding(sharding: Any, rows: Array, call: Call) -> Sharding:
    """sharding, or the type of rows, whose axes for the heads must divide the key/value heads."""
    static_sharding("sharding", sharding, True)
    named = jax.typeof(rows).sharding if sharding is None else sharding
    spec = named if isinstance(named, PartitionSpec) else named.spec
    mesh: Any = jax.sharding.get_abstract_mesh()
    mesh = named.mesh if isinstance(named, NamedSharding) else mesh
    entry = spec[rows.ndim - 2] if len(spec) > rows.ndim - 2 else None
    axes = entry if isinstance(entry, tuple) else (entry,) if isinstance(entry, str) else ()
    devices = math.prod(dict(mesh.shape).get(axis, 1) for axis in axes)
    heads, two_axes = call.layout.num_kv_heads, call.caches[0].ndim == 5
    if heads % devices or (two_axes and devices > 1):
        found = f"{heads} key/value heads over axes {axes} of size {devices}"
        other = "inside jax.shard_map give each device its own, as jax_fa3.own_kv_heads does"
        wanted = f"axes that divide them, and one axis of heads in the cache; {other}"
        raise wrong("sharding", found, wanted)
    return sharding


def _split(x: Array, axis: int) -> bool:
    """Whether its type says that it is split there."""
    spec = jax.typeof(x).sharding.spec
    return len(spec) > axis and bool(spec[axis])
