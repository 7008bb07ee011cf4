"""The one seam between a call and the devices: each works on its own batch entries and heads.

A call is described by one string per operand and result, with one letter per dimension: `b` batch,
`n` query heads, `k` key/value heads, `.` everything else, which must be whole on each device; `t` and
`h` are such dimensions of the first operand, query's sequence and head dim, that results have too. A `+`
in a result is a dimension of size 1 that was summed: the first over batch entries, the second over query
heads. JAX's transformations and meshes reach it in this order:

    _vmap       vmap: one more batch letter, folded into the batch on each device
    _named      explicit axes, and those of the argument `sharding`: jax.shard_map over them
    _automatic  all other axes: custom_partitioning; on one device and under manual axes alone that
                is no more than the call
    _letters    what they share: which axes a letter may have, and which devices share a head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from . import _named
from ._automatic import partitioned as partitioned
from ._letters import undistinguished
from ._named import own_kv_heads as own_kv_heads
from ._named import reshard as reshard
from ._vmap import folded_into_batch

Results = tuple[jax.Array, ...]


def per_device(
    function: Callable[..., Results], letters: tuple[Any, ...], results: tuple[str, ...]
) -> Callable[..., Results]:
    """function, run by each device on its own part of the operands, and by vmap on them all at once.

    To stand where derivatives are written out (_autodiff, _forward_mode), for it has none.

    Args:
        function: of pytrees of arrays to a tuple of arrays; it takes its sizes from its operands.
            The first dimension of each of them is the batch, or has size 1.
        letters: pytrees of strings like function's arguments; results: one for each result.
    """

    def call(*operands: Any) -> Results:
        flat, arrays = _flat(function, operands)
        dots = tuple(map(undistinguished, jax.tree.leaves(letters)))
        return folded_into_batch(flat, dots, tuple(map(undistinguished, results)))(*arrays)

    return call


def over_named_axes(
    function: Callable[..., Results],
    letters: tuple[Any, ...],
    results: tuple[str, ...],
    sharding: NamedSharding | PartitionSpec | None = None,
) -> Callable[..., Results]:
    """function under a jax.shard_map over all explicit axes, or over the axes of sharding, and JAX's
    derivative of that; where there are none, function itself. What a type splits along `t` and `h`
    is gathered for it, and split again in the results.

    Args: as for per_device; sharding is that of the first operand.
    """

    def call(*operands: Any) -> Results:
        flat, arrays = _flat(function, operands)
        mapped = _named.over_named_axes(flat, tuple(jax.tree.leaves(letters)), results, sharding)
        return mapped(*arrays)

    return call


def _flat(function: Callable[..., Results], operands: Any) -> tuple[Any, list[jax.Array]]:
    arrays, tree = jax.tree.flatten(operands)
    return lambda *arrays: function(*jax.tree.unflatten(tree, arrays)), arrays
