"""vmap of a call: one call of more batch entries, or of more query heads, with no collective; and with no
loop, but where a gradient of a bias is shared, or many keys and values would be copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from .._varying import vary_together
from . import _groups
from ._automatic import partitioned
from ._letters import sizes
from ._named import over_named_axes


def folded_into_batch(
    function: Callable[..., Any], letters: tuple[str, ...], results: tuple[str, ...]
) -> Callable[..., tuple[Array, ...]]:
    """function under vmap. The axis of each vmap has a capital for its letter and stands in front.

    All the batch letters become one batch on each device only, or a part of the query heads, so each
    of them may be split over devices by itself.
    """

    @custom_vmap
    def call(*operands: Array) -> tuple[Array, ...]:
        split = partitioned(_folded(function, letters, results), letters, results)

        def local(*operands: Array) -> tuple[Array, ...]:
            # An axis that vmap maps over may split some operands and not the others.
            return split(*vary_together(operands))

        return over_named_axes(local, letters, results)(*operands)

    @call.def_vmap
    def rule(_: int, in_batched: Any, *operands: Array) -> tuple[tuple[Array, ...], Any]:
        if "+" in "".join(results):  # each entry has sums of its own
            whole = folded_into_batch(function, letters, results)
            places = [0 if batched else None for batched in in_batched]
            found = _in_turn(whole, places, operands)
            return found, tuple(True for _ in found)
        new = chr(ord("A") + results[0].index("b"))
        more = tuple(
            new + dims if batched else dims
            for dims, batched in zip(letters, in_batched, strict=True)
        )
        call = folded_into_batch(function, more, tuple(new + dims for dims in results))
        return call(*operands), tuple(True for _ in results)

    return call


def _in_turn(
    call: Callable[..., tuple[Array, ...]],
    places: Sequence[int | None],
    operands: Sequence[Array],
) -> tuple[Array, ...]:
    """call of each entry of the axis that operands have at places; in front in the results."""
    pairs = list(zip(operands, places, strict=True))
    mapped = [jnp.moveaxis(x, place, 0) for x, place in pairs if place is not None]

    def entry(own: list[Array]) -> tuple[Array, ...]:
        rest = iter(own)
        return call(*(x if place is None else next(rest) for x, place in pairs))

    return lax.map(entry, mapped)


def _folded(
    function: Callable[..., Any], letters: tuple[str, ...], results: tuple[str, ...]
) -> Callable[..., tuple[Array, ...]]:
    """function of operands with all of the batch letters, in front, to results with them."""
    lead = results[0][: results[0].index("b") + 1]
    if lead == "b":
        return function

    def call(*operands: Array) -> tuple[Array, ...]:
        size = sizes(operands, letters)
        grouped = _groups.worth_grouping(operands, letters, results, size)
        waiting = _groups.worth_a_loop(operands, letters, results, size)
        if grouped:
            local = _folded(function, _without(grouped, letters), _without(grouped, results))
            return _groups.folded(local, letters, results, grouped)(*operands)
        if waiting:
            letter = waiting[0]
            local = _folded(function, _without(letter, letters), _without(letter, results))
            places = [dims.index(letter) if letter in dims else None for dims in letters]
            found = zip(_in_turn(local, places, operands), results, strict=True)
            return tuple(jnp.moveaxis(x, 0, dims.index(letter)) for x, dims in found)
        batch = [size[letter] for letter in lead]

        def fold(x: Array, dims: str) -> Array:
            own = [letter for letter in lead[:-1] if letter in dims]
            if not own and dims[0] == ".":
                return x  # one for all entries
            rest = x.shape[len(own) + 1 :]
            ones = [size[letter] if letter in own else 1 for letter in lead[:-1]]
            x = x.reshape(*ones, x.shape[len(own)], *rest)
            return jnp.broadcast_to(x, (*batch, *rest)).reshape(math.prod(batch), *rest)

        found = function(*map(fold, operands, letters))
        return tuple(x.reshape(*batch, *x.shape[1:]) for x in found)

    return call


def _without(letters: str, group: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dims.translate(dict.fromkeys(map(ord, letters))) for dims in group)
