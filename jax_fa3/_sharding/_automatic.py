"""Automatic mesh axes, whose use XLA's partitioner decides: a call as a custom_partitioning.

The partitioner hands over the shardings that it chose for operands and results, without mesh or
axis names. They are read as a mesh of our own, whose axes have prime sizes, so that key/value heads
can be split over a part of the axis that splits the query heads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from .. import _guards
from ._letters import CONTEXT_PARALLEL, Axes, ByLetter, sizes, spec, split_kv_heads, summed


def partitioned(
    function: Callable[..., Any],
    letters: Sequence[str],
    results: Sequence[str],
    *,
    sums: bool = True,
) -> Callable[..., tuple[Array, ...]]:
    """function on each device's own part of the operands, whatever part XLA gives it.

    sums: whether results with a `k` are summed over devices that share a key/value head; else none do.

    Warns at compilation where a dimension whose letter is a dot, or heads that cannot be split that
    way, are gathered.
    """

    def call(*operands: Array) -> tuple[Array, ...]:
        rule, factors = _sharding_rule(sizes(operands, letters), letters, results)
        split = custom_partitioning(function)
        split.def_partition(partition, sharding_rule=rule, decode_shardings=False, **factors)
        first, *others = operands
        return split(_guards.partitionable(first), *others)

    def partition(_: Any, operands: Any, found: Any) -> Any:
        every = (*operands, *found)
        mesh, axes_of = _read([(x.sharding, len(x.shape)) for x in every])
        axes = _choose(axes_of, [*letters, *results])
        size = sizes(operands, letters)
        # Part of the devices only: the others' axes are manual, and collectives cannot name ours.
        partial = mesh.size < len(operands[0].sharding.device_set)
        if partial and "+" in "".join(results):
            axes = {}
        may_sum = sums and not (partial and "k" in "".join(results))
        axes, shared = _fit_heads(axes, mesh, size, sums=may_sum)
        _warn_of_gathers(axes_of[: len(letters)], letters, axes)

        def local(*operands: Array) -> tuple[Array, ...]:
            # On one device's part: the axes of a jax.set_mesh around the compilation mean nothing.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                return tuple(
                    _sum(x, shared) if shared and "k" in dims else summed(x, dims, axes)
                    for x, dims in zip(function(*operands), results, strict=True)
                )

        given, made = (
            tuple(NamedSharding(mesh, spec(dims, axes)) for dims in group)
            for group in (letters, results)
        )
        return mesh, local, made, given

    return call


def _sum(x: Array, axes: Axes) -> Array:
    return lax.psum(x.astype(jnp.float32), axes).astype(x.dtype)


def _sharding_rule(
    size: dict[str, int], letters: Sequence[str], results: Sequence[str]
) -> tuple[str, dict[str, int]]:
    """In Shardy's notation, where query heads are key/value heads times a group: (k g)."""
    heads, kv_heads = size.get("n"), size.get("k")
    query, key, factors = "n", "k", {}
    if heads and kv_heads:
        if heads == kv_heads:
            query = key
        elif kv_heads > 1:  # a factor of size 1 must not be part of a product
            query, factors = "(k g)", {"g": heads // kv_heads}
    names = {"n": query, "k": key}
    dots = 0

    def mapping(dims: str) -> str:
        nonlocal dots
        factors = []
        for letter in dims:
            dots += letter in ".+"
            factors.append(f"dot{dots}" if letter in ".+" else names.get(letter, letter))
        return " ".join(factors)

    sides = (", ".join(map(mapping, group)) for group in (letters, results))
    return " -> ".join(sides), factors


def _read(shardings: Sequence[tuple[Any, int]]) -> tuple[Mesh, list[list[Axes]]]:
    """A mesh of as many devices as XLA's shardings are for, and each one's axes per dimension.

    XLA numbers devices by their place in the program, and so does the mesh: which ones they are
    does not matter. A dimension that is not split along axes of this mesh counts as not split.
    """
    tilings = [_tiling(sharding, rank) for sharding, rank in shardings]
    devices = max(map(len, tilings))
    shape = _prime_factors(devices)
    names = [f"axis{i}" for i in range(len(shape))]
    everyone = sorted(shardings[0][0].device_set, key=lambda device: device.id)
    mesh = Mesh(np.array(everyone[:devices]).reshape(shape), names)
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]

    def axes(parts: np.ndarray) -> Axes:
        """parts: [devices], the part of one dimension that each device has."""
        if not parts.any():
            return ()
        widths = [int(parts[step]) for step in steps]  # how far one step along each axis goes
        order = sorted((i for i, width in enumerate(widths) if width), key=lambda i: -widths[i])
        rebuilt = np.zeros(devices, int)
        for i in order:
            rebuilt = rebuilt * shape[i] + np.arange(devices) // steps[i] % shape[i]
        return tuple(names[i] for i in order) if (rebuilt == parts).all() else ()

    return mesh, [
        [axes(tiling[:, dim]) if len(tiling) == devices else () for dim in range(rank)]
        for tiling, (_, rank) in zip(tilings, shardings, strict=True)
    ]


def _tiling(sharding: Any, rank: int) -> np.ndarray:
    """[devices, rank]: the part of each dimension that each device has."""
    hlo = sharding._to_xla_hlo_sharding(rank)
    if not hlo.is_tiled():
        return np.zeros((1, rank), int)
    shape = hlo.tile_assignment_dimensions()
    parts = np.empty((math.prod(shape), rank), int)
    parts[hlo.tile_assignment_devices()] = np.indices(shape)[:rank].reshape(rank, -1).T
    return parts


def _prime_factors(n: int) -> list[int]:
    factors = []
    for p in range(2, n + 1):
        while n % p == 0:
            factors.append(p)
            n //= p
    return factors or [1]


def _choose(axes_of: Sequence[Sequence[Axes]], letters: Sequence[str]) -> ByLetter:
    """The axes of each letter: those of the first operand that has some, each axis once."""
    chosen: ByLetter = {}
    for dims, axes in zip(letters, axes_of, strict=True):
        for letter, found in zip(dims.replace("k", "n"), axes, strict=True):
            taken = {axis for of in chosen.values() for axis in of}
            if letter not in ".+" and not chosen.get(letter) and not taken.intersection(found):
                chosen[letter] = found
    return chosen


def _fit_heads(
    axes: ByLetter, mesh: Mesh, size: dict[str, int], sums: bool
) -> tuple[ByLetter, Axes]:
    """Axes that heads can be split over, the key/value heads' among them, and the axes whose devices
    share one key/value head; without sums there must be none of those."""
    heads, shared = axes.get("n", ()), ()
    while heads and size["n"] % math.prod(mesh.shape[axis] for axis in heads):
        heads = heads[:-1]
    if "k" in size and heads:
        kv_heads, shared = split_kv_heads(heads, mesh.shape, size["k"])
        each = size["k"] // math.prod(mesh.shape[axis] for axis in kv_heads)
        if shared and (each > 1 or not sums):
            heads, shared = kv_heads, ()
        axes = {**axes, "k": kv_heads}
    return {**axes, "n": heads}, shared


def _warn_of_gathers(
    axes_of: Sequence[Sequence[Axes]], letters: Sequence[str], axes: ByLetter
) -> None:
    """Where an operand is split over axes that its letter does not have."""
    moved = {
        letter
        for dims, found in zip(letters, axes_of, strict=False)
        for letter, of in zip(dims, found, strict=True)
        if not set(of) <= set(axes.get(letter, ()))
    }
    if "." in moved:
        text = f"a dimension that is neither batch nor heads (in a packed qkv the heads too); {CONTEXT_PARALLEL}"
        warnings.warn(f"jax_fa3 gathers {text}", stacklevel=2)
    elif moved:
        text = "batch or heads, which the operands do not split alike or the key/value heads not enough"
        warnings.warn(f"jax_fa3 gathers {text}: pass sharding=", stacklevel=2)
