"""Integers of any dtype as the int32 that everything here computes with, keeping what they mean.

NumPy's arrays may hold Python's integers here (dtype object); of JAX's arrays the values may not be
known. Without jax_enable_x64 their wide dtype is uint32, with it int64 and uint64 as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ._checks import wrong
from ._jitted import jitted
from ._problem import SegmentIds, Window
from ._varying import vary_together

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

# Of lengths, in what is said of run-time offsets beyond int32.
_LONGEST = 2**29


def saturating_add(x: Array | np.ndarray, c: int) -> Array:
    """x + c, clamped to int32, for integers x of any dtype and any Python integer c."""
    if isinstance(x, np.ndarray):
        exact = np.clip(x.astype(object) + c, INT32_MIN, INT32_MAX)
        return jnp.asarray(np.asarray(exact, np.int32))
    if np.can_cast(x.dtype, np.int32):
        x = x.astype(jnp.int32)
        if c == 0:
            return x
    limits = jnp.iinfo(x.dtype)
    low, high = max(INT32_MIN - c, int(limits.min)), min(INT32_MAX - c, int(limits.max))
    if low > high:  # every x saturates
        return jnp.full_like(x, INT32_MAX if c > 0 else INT32_MIN, dtype=jnp.int32)
    x = lax.clamp(np.array(low, x.dtype), x, np.array(high, x.dtype))
    # The sum fits int32, so 32-bit wrap-around gives it exactly from numbers that need 33 bits.
    if x.dtype != jnp.int32:
        steps = (x - np.array(low, x.dtype)).astype(jnp.uint32)
        x, c = lax.bitcast_convert_type(steps, jnp.int32), low + c
    return x + np.int32((c - INT32_MIN) % 2**32 + INT32_MIN)


def clamped(x: Array | np.ndarray) -> Array:
    """A length or a bound of an interval, as int32. Beyond int32 there are no keys: 0 says the same
    of what is below, and is no value that this library reserves."""
    found = saturating_add(x, 0)
    if not _is_wide(x) or not (isinstance(x, np.ndarray) or _is_signed(x.dtype)):
        return found
    return jnp.where(jnp.asarray(x < INT32_MIN, bool), 0, found)


def offset_and_window(offset: Array | np.ndarray, window: Window) -> tuple[Array, Window]:
    """A run-time query_offset as int32, and the window to go with it: together they mean what they
    did, for lengths up to 2**29 where offsets do not fit int32, and for all where they do."""
    left, right = window
    if not _is_wide(offset) or max(left or 0, right or 0) <= 2 * _LONGEST:
        return saturating_add(offset, 0), window  # off by far: the edges are past all keys, or rows
    if right is None and left is not None:
        return saturating_add(offset, -left), (0, None)
    assert right is not None
    ahead = saturating_add(offset, right)
    if left is None:
        return ahead, (None, 0)
    # The two edges are further apart than keys and rows together: one of them is past all, and the
    # same holds of a window that int32 has room for.
    behind = jnp.clip(saturating_add(offset, -left), -_LONGEST, _LONGEST) + 2 * _LONGEST
    return jnp.where(ahead < _LONGEST, ahead, behind), (2 * _LONGEST, 0)


def segment_ids(
    query: Array | np.ndarray, key: Array | np.ndarray, padding: int | None
) -> SegmentIds:
    """Both as JAX's arrays: int32, or of a wide dtype for `narrow_ids` to see to; negative ids may
    have become others. Values that are known, and do not fit, are seen to here."""
    if isinstance(query, np.ndarray) and isinstance(key, np.ndarray):
        if not (_is_wide(query) or _is_wide(key)):
            return SegmentIds(saturating_add(query, 0), saturating_add(key, 0), padding)
        exact = query.astype(object), key.astype(object)
        known = {x for ids in exact for x in ids.flat if x >= 0 and x != padding}
        numbers = {x: i for i, x in enumerate(known)}
        query_ids, key_ids = (
            np.array([numbers.get(x, -1) for x in ids.flat], np.int32).reshape(ids.shape)
            for ids in exact
        )
        return SegmentIds(jnp.asarray(query_ids), jnp.asarray(key_ids))
    found = [
        _beside(x, other.dtype, name) if isinstance(x, np.ndarray) else x
        for x, other, name in (
            (query, key, "query_segment_ids"),
            (key, query, "key_value_segment_ids"),
        )
    ]
    return SegmentIds(found[0], found[1], padding)


def narrow_ids(ids: SegmentIds) -> tuple[Array, Array]:
    """Segment ids [B, T] and [B, S] as int32, of which the same ones are equal and padding is
    negative. Ids beyond int32 become their places among the keys' ids, which takes a sort."""
    if np.can_cast(ids.query.dtype, np.int32) and np.can_cast(ids.key.dtype, np.int32):
        query_ids, key_ids = (x.astype(jnp.int32) for x in (ids.query, ids.key))
        if ids.padding is None:
            return query_ids, key_ids
        query_ids, key_ids = (
            jnp.where(_equals(x, ids.padding), -1, x) for x in (query_ids, key_ids)
        )
        return query_ids, key_ids
    return _narrow_ids(vary_together(ids))


@jitted(static=0)
def _narrow_ids(ids: SegmentIds) -> tuple[Array, Array]:
    both = ids.query, ids.key
    padding = [x < np.array(0, x.dtype) for x in both]
    if ids.padding is not None:
        padding = [p | _equals(x, ids.padding) for p, x in zip(padding, both, strict=True)]
    whole = [jnp.where(p, np.array(0, x.dtype), x) for p, x in zip(padding, both, strict=True)]
    wide: Any = max((x.dtype for x in both), key=lambda x: x.itemsize)
    wide = jnp.dtype(f"uint{8 * wide.itemsize}")

    def fits(ids: Array) -> Array:
        return (ids <= np.array(min(INT32_MAX, jnp.iinfo(ids.dtype).max), ids.dtype)).all()

    def ranked(query_ids: Array, key_ids: Array) -> tuple[Array, Array]:
        def one_entry(*ids: Array) -> tuple[Array, Array]:
            query_ids, key_ids = (x.astype(wide) for x in ids)
            # One more, so that there always is one to compare with. It and padding count as id 0,
            # which is right: what has that id is first, and padding is marked below.
            ordered = jnp.sort(jnp.append(key_ids, np.array(0, wide)))
            query, key = (
                jnp.where(ordered.at[place].get(mode="clip") == x, place, -1)
                for x in (query_ids, key_ids)
                for place in [count_while(lambda i, x=x: ordered[i] < x, x, ordered.shape[0])]
            )
            return query, key

        return jax.vmap(one_entry)(query_ids, key_ids)

    def cast(query_ids: Array, key_ids: Array) -> tuple[Array, Array]:
        return query_ids.astype(jnp.int32), key_ids.astype(jnp.int32)

    found = lax.cond(fits(whole[0]) & fits(whole[1]), cast, ranked, *whole)
    query_ids, key_ids = (jnp.where(p, -1, x) for p, x in zip(padding, found, strict=True))
    return query_ids, key_ids


def _equals(x: Array, number: int) -> Array:
    """x == number, which x's dtype may lack."""
    limits = jnp.iinfo(x.dtype)
    if not limits.min <= number <= limits.max:
        return jnp.zeros_like(x, bool)
    return x == np.array(number, x.dtype)


def count_while(holds: Callable[[Array], Array], like: Array, size: int) -> Array:
    """The number of i in [0, size) where holds(i), elementwise; it holds up to some i, and no more.

    Binary search: jnp.searchsorted of jax 0.11 does not take symbolic sizes.
    """

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        further = (low < high) & holds(middle)
        return jnp.where(further, middle + 1, low), jnp.where(further, high, middle)

    bounds = jnp.zeros_like(like, jnp.int32), jnp.full_like(like, size, jnp.int32)
    return lax.fori_loop(0, 32, halve, bounds)[0]


def _beside(ids: np.ndarray, dtype: np.dtype, name: str) -> Array:
    """ids that are known, in a dtype for them and for others that are not. Those that the others
    cannot have, or that are padding, become -1."""
    exact, limits = ids.astype(object), jnp.iinfo(dtype)
    exact = np.where((exact < 0) | (exact > int(limits.max)), -1, exact)
    if (exact <= INT32_MAX).all():
        return jnp.asarray(exact.astype(np.int32))
    if limits.min == 0 and (exact < 0).any():
        wanted = f"ids up to 2**31 - 1, or none that cannot be in the {dtype} that the others are"
        raise wrong(name, "negative ids and large ones", wanted)
    return jnp.asarray(exact.astype(dtype))


def _is_signed(dtype: np.dtype) -> bool:
    return jnp.iinfo(dtype).min < 0


def _is_wide(x: Array | np.ndarray) -> bool:
    """Whether there are values beyond int32; of a JAX array, whether there may be."""
    if isinstance(x, np.ndarray):
        return bool(((x < INT32_MIN) | (x > INT32_MAX)).any())
    return not np.can_cast(x.dtype, np.int32)
