"""vmap over the query alone: its axis becomes more query heads of each key/value head, or its entries are
computed one after the other, so that key and value are read as they are, not copied for every entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jax import Array

from ._letters import sizes

# Numbers in key and value from which on the gradients of one entry keep a whole GPU busy.
MANY = 2**22


def worth_grouping(
    operands: Sequence[Array],
    letters: Sequence[str],
    results: Sequence[str],
    size: dict[str, int],
) -> str:
    """The capitals, each the axis of one vmap, that shall go into the groups of query heads.

    They are on all operands with query heads and on no other; no result has key/value heads, for
    each entry would have some of its own. Query and result are transposed for it, key and value
    would be copied: nothing goes where that is fewer numbers, or where sizes are not known.
    """
    queries = [(x, dims) for x, dims in zip(operands, letters, strict=True) if "n" in dims]
    others = [(x, dims) for x, dims in zip(operands, letters, strict=True) if "n" not in dims]
    if "k" in "".join(results) or not size.get("k"):
        return ""
    grouped = "".join(
        letter
        for letter in size
        if letter.isupper()
        and all(letter in dims for _, dims in queries)
        and not any(letter in dims for _, dims in others)
    )
    entries = math.prod(size[letter] for letter in grouped)
    moved = 2 * sum(math.prod(x.shape) for x, _ in queries)  # the result is as large as the query
    copied = entries * sum(math.prod(x.shape) for x, dims in others if "k" in dims)
    known = all(isinstance(n, int) for n in (moved, copied))
    return grouped if grouped and known and copied >= moved else ""


def worth_a_loop(
    operands: Sequence[Array],
    letters: Sequence[str],
    results: Sequence[str],
    size: dict[str, int],
) -> str:
    """The capitals whose entries shall be computed one after the other: those that key and value, of which
    each entry has gradients of its own, have not, where these are large."""
    shared = [(x, dims) for x, dims in zip(operands, letters, strict=True) if "k" in dims]
    copied = sum(math.prod(x.shape) for x, _ in shared)
    if "k" not in "".join(results) or not isinstance(copied, int) or copied < MANY:
        return ""
    mapped = (letter for letter in size if letter.isupper())
    return "".join(letter for letter in mapped if not any(letter in dims for _, dims in shared))


def folded(
    function: Callable[..., Any], letters: Sequence[str], results: Sequence[str], grouped: str
) -> Callable[..., tuple[Array, ...]]:
    """function, which knows nothing of the axes of grouped, of operands with them.

    Heads become [k, *grouped, n / k], so that query head n still reads key/value head n // (N // K).
    """

    def call(*operands: Array) -> tuple[Array, ...]:
        size = sizes(operands, letters)
        found = function(
            *(
                _fold(x, *_orders(dims, grouped), size["k"]) if "n" in dims else x
                for x, dims in zip(operands, letters, strict=True)
            )
        )
        entries = [size[letter] for letter in grouped]
        return tuple(
            _unfold(x, *_orders(dims, grouped), size["k"], entries)
            for x, dims in zip(found, results, strict=True)
        )

    return call


def _orders(dims: str, grouped: str) -> tuple[list[Any], list[Any]]:
    """The dimensions, n as the two "k" and "g", in dims' order and with grouped between these."""
    outside: list[Any] = [i if letter != "n" else "k" for i, letter in enumerate(dims)]
    at = outside.index("k")
    outside.insert(at + 1, "g")
    moved = [dims.index(letter) for letter in grouped]
    inside = [i for i in outside if i not in moved]
    at = inside.index("g")
    return outside, inside[:at] + moved + inside[at:]


def _fold(x: Array, outside: list[Any], inside: list[Any], kv_heads: int) -> Array:
    at = outside.index("k")
    x = x.reshape(*x.shape[:at], kv_heads, x.shape[at] // kv_heads, *x.shape[at + 1 :])
    x = x.transpose([outside.index(i) for i in inside])
    at, end = inside.index("k"), inside.index("g") + 1
    return x.reshape(*x.shape[:at], math.prod(x.shape[at:end]), *x.shape[end:])


def _unfold(
    x: Array, outside: list[Any], inside: list[Any], kv_heads: int, entries: list[int]
) -> Array:
    at = inside.index("k")
    group = x.shape[at] // (kv_heads * math.prod(entries))
    x = x.reshape(*x.shape[:at], kv_heads, *entries, group, *x.shape[at + 1 :])
    x = x.transpose([inside.index(i) for i in outside])
    at = outside.index("k")
    return x.reshape(*x.shape[:at], kv_heads * group, *x.shape[at + 2 :])
