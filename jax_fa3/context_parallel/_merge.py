"""Results for parts of the keys, joined into the result for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from .._checks import array, wrong


def merge(outs: Sequence[Array] | Array, lses: Sequence[Array] | Array) -> tuple[Array, Array]:
    """Attention over all keys from its results over disjoint parts of them.

    Args:
        outs: of each part, [B, T, N, V] or without B; a sequence, or one array with a leading axis.
        lses: of each part, the log-sum-exp that return_residual gives, [B, T, N] or without B.

    Returns:
        out and lse in the shapes and dtypes of one part, computed in fp32 (fp64 for fp64). Where no
        part sees a key: 0 and -inf. Differentiable in outs and lses.

    Raises ValueError where shapes differ, or there are no parts.

    Parts of 16-bit outs are rounded twice, once here: take them in fp32 where they can be had.
    """
    outs, lses = _arrays("outs", outs), _arrays("lses", lses)
    if not outs or len(outs) != len(lses):
        raise wrong("lses", f"{len(lses)} for {len(outs)} outs", "one for each out, at least one")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape:
            raise wrong("outs", f"shapes {outs[0].shape} and {out.shape}", "one shape for all")
        if lse.shape != out.shape[:-1]:
            raise wrong("lses", f"shape {lse.shape}", f"{out.shape[:-1]} for out {out.shape}")
    stacked = jnp.stack(lses)
    top = jnp.max(stacked, axis=0)
    sees = top != -jnp.inf  # a NaN stays one
    top = jnp.where(sees, top, 0)
    weights = jnp.exp(stacked - top[None])
    total = jnp.where(sees, weights.sum(0), 1)
    weights = (weights / total[None])[..., None]
    out = sum(w * x.astype(w.dtype) for w, x in zip(weights, outs, strict=True))
    lse = jnp.where(sees, top + jnp.log(total), -jnp.inf)
    return jnp.asarray(out, outs[0].dtype), lse.astype(lses[0].dtype)


def _arrays(name: str, x: Any) -> list[Array]:
    if not isinstance(x, (Array, np.ndarray, Sequence)) or isinstance(x, str):
        raise wrong(name, type(x).__name__, "a sequence of arrays, or one array")
    return [array(name, part) for part in x]
