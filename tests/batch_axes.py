"""Calls with two batch axes in the tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_fa3

BATCH = A, B = 2, 3
T, S, N, K, H, V = 6, 7, 4, 2, 8, 16
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


QKV = normal(*BATCH, T, N, H), normal(*BATCH, S, K, H), normal(*BATCH, S, K, V)
COTANGENTS = normal(*BATCH, T, N, V), normal(*BATCH, T, N)


def grads(cotangents: Any, *arrays: Array, names: Any = (), **options: Any) -> Any:
    """Results, and gradients of query, key, value, and of the options of these names."""

    def call(*arrays: Array) -> Any:
        given = dict(zip(names, arrays[3:], strict=True))
        return jax_fa3.dot_product_attention(*arrays[:3], **given, **options, return_residual=True)

    found, pullback = jax.vjp(call, *arrays)
    return found, pullback(cotangents)
