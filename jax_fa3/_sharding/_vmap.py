"""vmap of a call: one call of more batch entries, or of more query heads, with no collective; and with no
loop, but where a gradient of a bias is shared."""

from __future__ import annotations

import math
from collections.abc import Callable
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
            return _one_by_one(whole, in_batched, operands)
        new = chr(ord("A") + results[0].index("b"))
        more = tuple(
            new + dims if batched else dims
            for dims, batched in zip(letters, in_batched, strict=True)
        )
        call = folded_into_batch(function, more, tuple(new + dims for dims in results))
        return call(*operands), tuple(True for _ in results)

    return call


def _one_by_one(
    call: Callable[..., tuple[Array, ...]], in_batched: Any, operands: tuple[Array, ...]
) -> tuple[tuple[Array, ...], Any]:
    mapped = [x for x, batched in zip(operands, in_batched, strict=True) if batched]

    def entry(own: list[Array]) -> tuple[Array, ...]:
        rest = iter(own)
        pairs = zip(operands, in_batched, strict=True)
        return call(*(next(rest) if batched else x for x, batched in pairs))

    found = lax.map(entry, mapped)
    return found, tuple(True for _ in found)


def _folded(
    function: Callable[..., Any], letters: tuple[str, ...], results: tuple[str, ...]
) -> Callable[..., tuple[Array, ...]]:
    """function of operands with all of the batch letters, in front, to results with them."""
    lead = results[0][: results[0].index("b") + 1]
    if lead == "b":
        return function

    def call(*operands: Array) -> tuple[Array, ...]:
        size = sizes(operands, letters)
        grouped = _groups.worth_it(operands, letters, results, size)
        if grouped:
            fewer, made = (
                tuple(dims.translate(dict.fromkeys(map(ord, grouped))) for dims in group)
                for group in (letters, results)
            )
            local = _folded(function, fewer, made)
            return _groups.folded(local, letters, results, grouped)(*operands)
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
