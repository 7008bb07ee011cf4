"""Mesh axes whose use is known at trace time: a call becomes a jax.shard_map over them.

Those are explicit axes, which the operands' types name, and the axes of the argument `sharding`.
JAX differentiates the shard_map, so gradients have the operands' types and are summed where devices
share an operand; it exports and hits the persistent compilation cache.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .._checks import array, wrong
from ._letters import (
    CONTEXT_PARALLEL,
    Axes,
    ByLetter,
    sizes,
    spec,
    split_kv_heads,
    summed,
    undistinguished,
)

_NAMES = {"b": "batch entries", "n": "query heads", "k": "key/value heads"}


class _Plan(NamedTuple):
    mesh: Any
    names: frozenset[str]  # the axes of the shard_map
    axes: ByLetter
    shared: Axes  # split the query heads, but not the key/value heads
    gathered: ByLetter  # split a dimension of the first operand that must be whole: "t" or "h"


def over_named_axes(
    function: Callable[..., tuple[Array, ...]],
    letters: Sequence[str],
    results: Sequence[str],
    sharding: NamedSharding | PartitionSpec | None = None,
) -> Callable[..., tuple[Array, ...]]:
    """function on each device's own part of the operands; without named axes function itself. Results
    have the first operand's axes, those that were gathered too, and else those of the others.

    Args:
        sharding: of the first operand, instead of the operands' types.

    Warns where a type splits a dimension that must be whole: it is gathered.

    Raises ValueError for axes that do not exist, do not divide, or differ between operands.
    """

    def call(*operands: Array) -> tuple[Array, ...]:
        size = sizes(operands, tuple(map(undistinguished, letters)))
        if sharding is None:
            plan = _from_types(operands, letters, size)
        else:
            plan = _from_argument(sharding, operands, letters[0], size)
        if plan is None:
            return function(*operands)
        specs = tuple(spec(dims, plan.axes) for dims in letters)

        def local(*operands: Array) -> tuple[Array, ...]:
            if plan.shared:
                operands = tuple(
                    own_kv_heads(x, plan.shared, dims.index("k")) if "k" in dims else x
                    for x, dims in zip(operands, letters, strict=True)
                )
            found = function(*operands)
            return tuple(summed(x, dims, plan.axes) for x, dims in zip(found, results, strict=True))

        out_specs = tuple(spec(dims, plan.axes) for dims in results)
        # Inside another shard_map JAX (0.10 to 0.12) differentiates one wrongly, and notices, unless
        # it keeps nothing for the backward but the operands: then the forward runs twice.
        nested = _axes(plan.mesh, AxisType.Manual)
        mapped = jax.shard_map(
            jax.checkpoint(local) if nested else local,
            mesh=plan.mesh,
            in_specs=specs,
            out_specs=out_specs,
            # The empty set, JAX's default, stands for all axes of the mesh, but those that split a
            # dimension which a vmap around this call maps over: JAX refuses their names, and there is
            # no asking for them.
            axis_names=set() if plan.names == set(plan.mesh.axis_names) else plan.names,
        )
        found = mapped(*(reshard(x, plan.mesh, s) for x, s in zip(operands, specs, strict=True)))
        if not plan.gathered:
            return found
        axes = _given_back(plan)
        made = (spec(dims, axes) for dims in results)
        return tuple(reshard(x, plan.mesh, s) for x, s in zip(found, made, strict=True))

    return call


def _given_back(plan: _Plan) -> ByLetter:
    """The axes of results: an axis that is used twice stays where the first operand has it."""
    own = {axis for of in plan.gathered.values() for axis in of}
    axes = {letter: tuple(a for a in of if a not in own) for letter, of in plan.axes.items()}
    return axes | plan.gathered


def own_kv_heads(x: Array, axis_name: str | Axes, axis: int = -2) -> Array:
    """The key/value heads that this device's query heads read, of an array that has them all.

    For use inside jax.shard_map where the query heads are split over a mesh axis and key and value
    are not, because the axis is wider than their number of heads: query head n reads key/value head
    n // (N // K), so the device must take its own before it calls `dot_product_attention`.

    Args:
        x: [..., K, D], key or value, with K heads.
        axis_name: of the mesh axis, or axes, that the query heads are split over.
        axis: of the heads.

    Returns: [..., max(1, K / size), D]. The gradient is summed over the devices.

    Raises ValueError if neither K nor the size of the axis divides the other.
    """
    x = array("x", x)
    heads, devices = x.shape[axis], lax.axis_size(axis_name)
    if heads % devices and devices % heads:
        wanted = f"a divisor or a multiple of the {heads} key/value heads"
        raise wrong("axis_name", f"{axis_name!r} of size {devices}", wanted)
    count = max(1, heads // devices)
    start = lax.div(lax.axis_index(axis_name) * heads, devices)
    return lax.dynamic_slice_in_dim(x, start, count, axis)


def _from_types(
    operands: Sequence[Array], letters: Sequence[str], size: dict[str, int]
) -> _Plan | None:
    """The plan of the explicit axes, if there are any."""
    types = [jax.typeof(x).sharding for x in operands]
    context = jax.sharding.get_abstract_mesh()  # under vmap over a split axis, it lacks that
    meshes = [context] if not context.empty else [t.mesh for t in types]
    mesh = next((mesh for mesh in meshes if _axes(mesh, AxisType.Explicit)), None)
    if mesh is None:
        return None
    axes: ByLetter = {}
    whole: Axes = ()
    gathered: ByLetter = {}
    for dims, t in zip(letters, types, strict=True):
        for letter, entry in zip(dims, t.spec, strict=False):
            found = _as_axes(entry)
            if letter in ".th" and found:
                _warn_of_gather(found)
                whole += found
                gathered |= {letter: found} if letter != "." else {}
            elif found and axes.setdefault(letter, found) != found:
                name = _NAMES.get(letter, "batch entries")
                raise wrong("sharding", f"{name} split over {axes[letter]} and {found}", "the same")
    if not axes and not whole and _axes(mesh, AxisType.Manual):
        return None  # whole on each device; and the axis of a vmap around this cannot be named
    plan = _complete(mesh, _axes(mesh, AxisType.Explicit), axes, size)
    return plan._replace(gathered=gathered)


def _from_argument(
    sharding: NamedSharding | PartitionSpec,
    operands: Sequence[Array],
    letters: str,
    size: dict[str, int],
) -> _Plan:
    """The plan of the argument: it takes all axes of the mesh that are not manual yet."""
    meshes = [jax.typeof(x).sharding.mesh for x in operands] + [jax.sharding.get_abstract_mesh()]
    mesh: Any = next((m for m in meshes if not m.empty), None)
    if isinstance(sharding, NamedSharding):
        entries: Any = sharding.spec
        mesh = mesh or sharding.mesh
    else:
        entries = sharding
    if mesh is None:
        raise wrong("sharding", sharding, "a NamedSharding, for there is no jax.set_mesh here")
    if isinstance(sharding, NamedSharding) and dict(mesh.shape) != dict(sharding.mesh.shape):
        raise wrong(
            "sharding", f"mesh {dict(sharding.mesh.shape)}", f"this one: {dict(mesh.shape)}"
        )
    free = set(mesh.axis_names) - set(_axes(mesh, AxisType.Manual))
    if len(entries) > len(letters):
        raise wrong("sharding", sharding, f"at most {len(letters)} entries")
    axes: ByLetter = {}
    for letter, entry in zip(letters, entries, strict=False):
        for axis in _as_axes(entry):
            if axis not in free:
                raise wrong("sharding", f"axis {axis!r}", f"one of {sorted(free)}, not manual yet")
            if letter in ".th":
                raise wrong("sharding", f"{sharding}", f"batch and heads alone; {CONTEXT_PARALLEL}")
        axes[letter] = _as_axes(entry)
    return _complete(mesh, tuple(free), axes, size)


def _complete(mesh: Any, names: Axes, axes: ByLetter, size: dict[str, int]) -> _Plan:
    """Checked, and with the axes of the key/value heads, which follow the query heads."""
    heads, shared = axes.get("n") or axes.get("k", ()), ()
    if axes.get("k") not in (None, (), heads, heads[: len(axes.get("k", ()))]):
        found = f"query heads split over {heads}, key/value heads over {axes['k']}"
        raise wrong("sharding", found, "the same axes")
    axes = {**axes, "n": heads} if "n" in size else axes
    if "k" in size and heads:
        axes["k"], shared = split_kv_heads(heads, mesh.shape, size["k"])
    used = [axis for letter in axes if letter != "k" for axis in axes[letter]]
    for axis in used:
        if used.count(axis) > 1:
            raise wrong("sharding", f"axis {axis!r} for batch and heads", "one use of each axis")
    for letter, of in axes.items():
        devices = math.prod(mesh.shape[axis] for axis in of)
        if size.get(letter, 0) % devices:
            found = f"axes {of} of size {devices} for {size[letter]} {_NAMES.get(letter)}"
            raise wrong("sharding", found, "a size that divides them")
    devices = math.prod(mesh.shape[axis] for axis in shared)
    each = size.get("k", 1) // math.prod(mesh.shape[axis] for axis in axes.get("k", ()))
    if shared and devices % each:
        found = f"axes {heads} for {size['n']} query and {size['k']} key/value heads"
        wanted = f"sizes that divide the {size['k']}, or are multiples of them"
        raise wrong("sharding", f"{found}, sizes {[mesh.shape[a] for a in heads]}", wanted)
    return _Plan(mesh, frozenset(names), axes, shared, {})


def _axes(mesh: Any, kind: AxisType) -> Axes:
    return tuple(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == kind)


def _as_axes(entry: Any) -> Axes:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def reshard(x: Array, mesh: Any, wanted: PartitionSpec) -> Array:
    """x with that type, where axes are explicit; shard_map itself moves what automatic ones hold."""
    explicit = _axes(mesh, AxisType.Explicit)
    entries = [tuple(a for a in _as_axes(entry) if a in explicit) for entry in wanted]
    found = [*map(_as_axes, jax.typeof(x).sharding.spec)]
    if found == entries + [()] * (len(found) - len(entries)):
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*entries)))


def _warn_of_gather(axes: Axes) -> None:
    warnings.warn(
        f"jax_fa3 gathers a sequence or head dim that is split over {axes}; {CONTEXT_PARALLEL}",
        stacklevel=2,
    )
