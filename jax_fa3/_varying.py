"""The mesh axes of shard_map over which an array is known to vary."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax import Array

_Tree = TypeVar("_Tree")


def vary_together(arrays: _Tree) -> _Tree:
    """The arrays of a pytree, each varying over all mesh axes of shard_map that any varies over.

    A custom call demands it of its operands. In front of a custom_vjp it keeps gradients right: the
    transpose of this promotion is the sum over the devices among which an operand is replicated.
    """
    axes = frozenset[Any]().union(*map(varying, jax.tree.leaves(arrays)))
    return jax.tree.map(lambda x: _vary(x, axes), arrays)


def vary_as(x: Array, like: Array) -> Array:
    return _vary(x, varying(like))


def _vary(x: Array, axes: frozenset[Any]) -> Array:
    return jax.lax.pcast(x, tuple(sorted(axes - varying(x))), to="varying")


def varying(x: Array) -> frozenset[Any]:
    kind: Any = jax.typeof(x)
    if jax.__version_info__ < (0, 10):
        return kind.vma
    return kind.manual_axis_type.varying
