"""How the arrays of a call lie on a mesh, if one sharding says so for all of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .._checks import wrong
from .._operands import Operands
from .._problem import Masks, SegmentIds, Sizes
from ._checks import check_lengths
from ._layout import Layout


class Specs(NamedTuple):
    """The mesh, and its axes, or None, that split batch, sequence and heads."""

    mesh: Any
    batch: Any
    sequence: str
    heads: Any

    @classmethod
    def of(cls, sharding: NamedSharding, layout: Layout, sizes: Sizes, batched: bool) -> Specs:
        """Of a sharding of query; sizes of whole arrays. Raises ValueError where it does not fit."""
        mesh, axis_name = sharding.mesh, layout.axis_name
        rank = 4 if batched else 3
        entries = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
        batch, sequence, heads, *rest = entries if batched else (None, *entries)
        if sequence not in (axis_name, (axis_name,)) or rest != [None]:
            shape = "[B, T, N, H]" if batched else "[T, N, H]"
            wanted = f"{axis_name!r} in T of query {shape} and nothing in H"
            raise wrong("sharding", sharding.spec, wanted)
        check_lengths(layout, sizes, devices=layout.size)
        for name, count, axes in (
            ("query: batch", sizes.batch, batch),
            ("query: heads", sizes.num_heads, heads),
            ("key: heads", sizes.num_kv_heads, heads),
        ):
            axes = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
            devices = math.prod(mesh.shape[axis] for axis in axes)
            if count % devices:
                wanted = f"a multiple of {devices}, the devices of mesh axes {axes}, by sharding"
                raise wrong(name, count, wanted)
        return cls(mesh, batch, axis_name, heads)

    def arguments(self, operands: Operands, masks: Masks, segment_ids: SegmentIds | None) -> Any:
        """Specs of each."""
        _, batch, sequence, heads = self
        rows = P(batch, sequence)
        offset = masks.query_offset
        one_offset = offset is not None and offset.shape[0] == 1
        each = P() if one_offset else P(batch), P(batch), P(batch), rows, rows
        present: list[Any] = [
            None if x is None else spec for x, spec in zip(masks, each, strict=True)
        ]
        tensors = jax.tree.map(lambda _: P(batch, sequence, heads), operands)
        if operands.sinks is not None:
            tensors = dataclasses.replace(tensors, sinks=P(None, heads))
        return tensors, Masks(*present), jax.tree.map(lambda _: rows, segment_ids)

    @property
    def results(self) -> Any:
        """Specs of out [B, T, N, V] and lse [B, N, T]."""
        return P(self.batch, self.sequence, self.heads), P(self.batch, self.heads, self.sequence)
