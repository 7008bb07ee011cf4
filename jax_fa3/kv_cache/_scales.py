"""Scales of keys and values in a cache: a stored number times its scale is what it stands for.

scale: None, [], [K], [B, K], or one per token and head in pages, which has 3 or 4 axes.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from .._problem import E4M3, E4M3_MAX
from ._layout import Layout


def scale_of(
    scale: Array | None,
    layout: Layout,
    sequence: Array,
    pages: Array,
    slots: Array,
    dtype: Any,
) -> Array:
    """Of positions, so that it broadcasts to [..., K, D]; pages, slots: [...].

    sequence: of the positions, as many axes of [...] as it has, from the first on.
    """
    ones = [1] * pages.ndim
    if scale is None:
        found = jnp.ones((*ones, 1), dtype)
    elif scale.ndim < 2:
        found = scale.reshape(*ones, -1)
    elif scale.ndim == 2:
        found = scale[sequence]
        found = found.reshape(*sequence.shape, *ones[sequence.ndim :], -1)
    else:
        found = layout.read_per_token(scale, pages, slots)
    return found.astype(dtype)[..., None]


def quantized(x: Array, scale: Array, dtype: np.dtype) -> Array:
    """x / scale in the cache's dtype. Nothing that is not NaN becomes one: e4m3, which has no
    infinity, saturates, and 0 is 0 by a scale of 0 as well."""
    wide = x.astype(scale.dtype)
    found = jnp.where(wide == 0, 0, wide / scale)
    if dtype == E4M3:
        found = jnp.clip(found, -E4M3_MAX, E4M3_MAX)
    return found.astype(dtype)
