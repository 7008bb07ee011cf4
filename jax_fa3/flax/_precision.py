"""A layer's precision, for its attention's products on the XLA path."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax import lax

from .._checks import wrong


def matmul_precision(precision: Any) -> contextlib.AbstractContextManager[None]:
    """A context of a jax.lax.Precision, of one by its name, or of a pair of them."""
    pair = precision if isinstance(precision, (tuple, list)) else (precision,)
    try:
        given = [lax.Precision(x) for x in pair if x is not None]
    except ValueError:
        wanted = "None, a jax.lax.Precision or the name of one, or a pair of them"
        raise wrong("precision", repr(precision), wanted) from None
    if not given:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(max(given, key=lambda x: x.value).name.lower())
