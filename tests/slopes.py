"""ALiBi's slopes in the tests: what they are, and how exact their gradient is to be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from jax import Array

from jax_fa3 import _reference


def slopes_of(heads: int) -> Array:
    """Those of the paper, for so many heads."""
    return jnp.asarray([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)], jnp.float32)


def assert_slopes(found: Any, case: Case, arrays: Any, cotangents: Any) -> None:
    """The gradient of slopes [N], arrays[3]: each is a sum over all scores, of which those of a row are
    wrong together and those of several rows independently; by the rounding of weights, and by that of out in
    the row's sum of dout * out, as in helpers.oracle."""
    dtype = arrays[0].dtype
    q, k, v, slopes = (x.astype(jnp.float32) for x in arrays)
    scores = jnp.zeros((case.B, case.N, case.T, case.S))
    upper = tuple(x.astype(jnp.float32) for x in cotangents)

    def attend(bias: Array, **options: Any) -> Any:
        masks = case.arguments | options
        return _reference.attention(q, k, v, **masks, alibi_slopes=slopes, bias=bias)

    @jax.jit
    def found_in_fp32(scores: Array) -> tuple[Array, ...]:
        (out, lse), pullback = jax.vjp(attend, scores)
        change = (upper[0] * (attend(scores, round_to=dtype)[0] - out)).sum(-1)  # [B, T, N]
        (weights,) = pullback((jnp.zeros_like(out), jnp.ones_like(lse)))
        return *pullback(upper), weights, jnp.swapaxes(change, 1, 2)

    with jax.default_matmul_precision("highest"):
        terms, weights, change = (np.array(x, np.float64) for x in found_in_fp32(scores))
    distance = np.arange(case.S) - np.arange(case.T)[:, None]
    terms = terms * distance
    of_rows = jnp.finfo(dtype).eps * np.abs(terms).sum(-1)
    change[np.isnan(change)] = 0  # of a broken run's rows, which have no gradient
    of_out = change * np.abs(weights * distance).sum(-1)
    unit = np.sqrt((of_rows**2 + of_out**2).sum((0, 2)))
    assert (np.abs(found - terms.sum((0, 2, 3))) <= 2 * unit + 1e-6).all()
