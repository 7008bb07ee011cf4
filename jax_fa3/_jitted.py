"""How this package jits what its public functions do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

_Result = TypeVar("_Result")


def jitted(static: int) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """jax.jit of a function whose first `static` arguments are static, inlined where it is traced.

    Also under jax.disable_jit: what is inside has to be lowered as one (it asks for the platform, is
    split over devices), and its loops, run step by step, would take minutes.
    """

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        # debug_infs is part of the key, for finite_in_debug_mode depends on it.
        def keyed(debug_infs: bool, *arguments: Any) -> _Result:
            # Where jax_debug_nans has found one, JAX calls this again, op by op, with what the caller
            # gave: a Python float is none of the arrays that are meant.
            arrays = jax.tree.map(_as_array, arguments[static:])
            return function(*arguments[:static], *arrays)

        compiled = jax.jit(
            functools.wraps(function)(keyed), static_argnums=range(static + 1), inline=True
        )

        @functools.wraps(function)
        def call(*arguments: Any) -> _Result:
            config: Any = jax.config  # whose attributes type checkers do not know
            debug_infs = config.jax_debug_infs
            # A Python float that is too large for fp32 is inf there: NumPy need not warn.
            with jax.disable_jit(False), np.errstate(over="ignore"):
                return compiled(debug_infs, *arguments)

        return call

    return decorate


def _as_array(x: Any) -> jax.Array:
    return x if isinstance(x, jax.Array) else jax.numpy.asarray(x)


def finite_in_debug_mode(lse: jax.Array) -> jax.Array:
    """lse, to be kept for the backward. Under jax_debug_infs, which looks at what an eager forward
    keeps, without the -inf of rows that see no key: their lse is not used."""
    if not jax.config.jax_debug_infs:  # pyright: ignore[reportAttributeAccessIssue]
        return lse
    return jax.numpy.where(lse == -jax.numpy.inf, 0, lse)
