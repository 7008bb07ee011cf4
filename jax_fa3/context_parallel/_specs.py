"""How the arrays of a call lie on a mesh, if one sharding says so for all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from .. import _sharding
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
        mesh, axis_name = _mesh_here(sharding.mesh), layout.axis_name
        rank = 4 if batched else 3
        entries = [None if entry is P.UNCONSTRAINED else entry for entry in sharding.spec]
        entries += [None] * (rank - len(entries))
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
            _check_free(mesh, (axis_name, *axes))
            devices = math.prod(mesh.shape[axis] for axis in axes)
            if count % devices:
                wanted = f"a multiple of {devices}, the devices of mesh axes {axes}, by sharding"
                raise wrong(name, count, wanted)
        return cls(mesh, batch, axis_name, heads)

    def split(self, local: Callable[..., Any], *arrays: Any) -> tuple[Array, ...]:
        """The results of local, of one device's part, for whole arrays: operands, masks, segment ids."""
        in_specs = self.arguments(*arrays)
        arrays = jax.tree.map(
            lambda x, spec: _sharding.reshard(x, self.mesh, spec), arrays, in_specs
        )
        manual = _manual(self.mesh)
        return jax.shard_map(
            # Inside another shard_map it keeps nothing but its arguments: see _sharding/_named.py.
            jax.checkpoint(local) if manual else local,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=self.results,
            axis_names=set(self.mesh.axis_names) - manual if manual else set(),
        )(*arrays)

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


def _mesh_here(mesh: Any) -> Any:
    """The mesh, or that of jax.set_mesh or of a shard_map around the call, which has the same axes and
    knows of which kind they are here: a shard_map takes no other."""
    here = jax.sharding.get_abstract_mesh()
    if here.empty or here == mesh.abstract_mesh:
        return mesh
    if dict(here.shape) != dict(mesh.shape):
        raise wrong("sharding", f"mesh {dict(mesh.shape)}", f"this one: {dict(here.shape)}")
    return here


def _check_free(mesh: Any, axes: Sequence[str]) -> None:
    manual = _manual(mesh)
    for axis in axes:
        if axis in manual:
            free = sorted({*mesh.axis_names} - manual)
            wanted = f"one of {free}, not manual yet; or each device's part, without sharding"
            raise wrong("sharding", f"axis {axis!r}", wanted)


def _manual(mesh: Any) -> set[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis for axis, kind in kinds if kind == AxisType.Manual}
