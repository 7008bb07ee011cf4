"""Sinks: of each query head one number that counts in the softmax's denominator as the score of one
more key would, whose value is 0 (Xiao et al., arXiv 2309.17453; learned, as in gpt-oss).

A row that sees no key has none either. Of the others out = sigmoid(lse - sink) * out and lse =
log(exp(lse) + exp(sink)), if these are the results without it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ._broken import row_sums
from ._operands import Rows


def with_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """The results [B, T, N, V] and [B, N, T] of all keys with sinks [1 or B, N] among them; with JAX's
    derivative. The kernels do the same at their end."""
    sees = lse > -jnp.inf  # a broken row does not
    safe, sinks = jnp.where(sees, lse, 0), sinks[..., None]
    share = jnp.where(sees, jax.nn.sigmoid(safe - sinks), 1)
    out = (out.astype(lse.dtype) * jnp.swapaxes(share, 1, 2)[..., None]).astype(out.dtype)
    return out, jnp.where(sees, jnp.logaddexp(safe, sinks), lse)


def gradient(sinks: Array, rows: Rows) -> Array:
    """[B, N], of sinks [1 or B, N], by what the backward is given of every row."""
    assert rows.out is not None
    terms = rows.whole_dlse() - row_sums(rows.dout, rows.out, rows.lse.dtype)
    # A sink's weight in each row; its value is 0, and so is the product with dout.
    weights = jnp.exp(sinks[..., None] - rows.lse)
    return jnp.where(rows.lse > -jnp.inf, weights * terms, 0).sum(-1)
