"""Numbers of any dtype as words of 32 bits, so that all that travels can be one array."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def to_words(x: Array) -> Array:
    """uint32 [..., words] of a [..., columns] of 16, 32 or 64 bits each, in the order of memory."""
    *shape, columns = x.shape
    if x.dtype.itemsize == 2:
        columns += columns % 2
        x = jnp.pad(x, [(0, 0)] * len(shape) + [(0, columns - x.shape[-1])])
        x = x.reshape(*shape, columns // 2, 2)
    words = lax.bitcast_convert_type(x, jnp.uint32)
    return words.reshape(*shape, columns * x.dtype.itemsize // 4)


def from_words(words: Array, dtype: Any, columns: int) -> Array:
    """What to_words was given; there may be more words behind."""
    itemsize = jnp.dtype(dtype).itemsize
    words = words[..., : -(-columns * itemsize // 4)]
    if itemsize == 8:
        words = words.reshape(*words.shape[:-1], columns, 2)
    x = lax.bitcast_convert_type(words, dtype)
    if itemsize == 2:
        x = x.reshape(*words.shape[:-1], 2 * words.shape[-1])
    return x[..., :columns]
