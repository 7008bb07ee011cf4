"""relative_bias in the tests: tables by distance, and how exact their gradient is to be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from jax import Array

from jax_fa3 import _reference


def table_of(case: Case, farthest: int, scale: float = 1.0) -> Array:
    rng = np.random.default_rng(len(case.name) + farthest)
    return jnp.asarray(scale * rng.standard_normal((case.N, 2 * farthest + 1)), jnp.float32)


def assert_table(found: Any, case: Case, arrays: Any, cotangents: Any) -> None:
    """The gradient of a table [N, 2 max + 1], arrays[3]: each entry is a sum over scores, which are wrong as
    in slopes.assert_slopes, but of fewer rows."""
    dtype = arrays[0].dtype
    q, k, v, table = (x.astype(jnp.float32) for x in arrays)
    scores = jnp.zeros((case.B, case.N, case.T, case.S))
    upper = tuple(x.astype(jnp.float32) for x in cotangents)

    def attend(bias: Array, **options: Any) -> Any:
        masks = case.arguments | options
        return _reference.attention(q, k, v, **masks, relative_bias=table, bias=bias)

    @jax.jit
    def found_in_fp32(scores: Array) -> tuple[Array, ...]:
        (out, lse), pullback = jax.vjp(attend, scores)
        # What a row's sum of dout * out is off by, as each element of out is rounded by itself: of few rows
        # one draw of that, as in assert_slopes, would say too little.
        change = jnp.finfo(dtype).eps * jnp.linalg.norm(upper[0] * out, axis=-1)  # [B, T, N]
        (weights,) = pullback((jnp.zeros_like(out), jnp.ones_like(lse)))
        return *pullback(upper), weights, jnp.swapaxes(change, 1, 2)

    with jax.default_matmul_precision("highest"):
        terms, weights, change = (np.array(x, np.float64) for x in found_in_fp32(scores))
    change[np.isnan(change)] = 0  # of a broken run's rows, which have no gradient
    farthest = table.shape[1] // 2
    offset = np.reshape(case.mask.get("query_offset", 0), (-1, 1, 1))
    distance = np.arange(case.S) - np.arange(case.T)[:, None] - offset  # [1 or B, T, S]
    place = np.broadcast_to(np.clip(distance, -farthest, farthest) + farthest, terms[:, 0].shape)

    def by_entry(x: np.ndarray) -> np.ndarray:
        """[B, N, T, S] to [B, N, T, 2 max + 1]."""
        rows = np.arange(x.size // x.shape[-1])[:, None]
        places = np.broadcast_to(place[:, None], x.shape).reshape(len(rows), -1)
        size = table.shape[1]
        flat = np.bincount((rows * size + places).ravel(), x.ravel(), len(rows) * size)
        return flat.reshape(*x.shape[:-1], size)

    of_rows = jnp.finfo(dtype).eps * by_entry(np.abs(terms))
    of_out = change[..., None] * by_entry(np.abs(weights))
    unit = np.sqrt((of_rows**2 + of_out**2).sum((0, 2)))
    assert (np.abs(found - by_entry(terms).sum((0, 2))) <= 2 * unit + 1e-6).all()
