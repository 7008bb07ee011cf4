"""Terms of the scores that heads have, ALiBi's slopes and a bias by distance, in the tests."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from cases import CAUSAL
from jax import Array

import jax_fa3

attention = functools.partial(jax_fa3.dot_product_attention, return_residual=True)


def grads(name: str, function: Any, cotangents: Any, *arrays: Array, **options: Any) -> Any:
    """A loss and its gradients, of query, key, value, and the term of this name."""
    *_, term = arrays
    options = {**CAUSAL, "sinks": jnp.ones(len(term)), **options}

    def loss(q: Array, k: Array, v: Array, term: Array) -> Array:
        found = function(q, k, v, **{name: term}, **options)
        pairs = zip(found, cotangents, strict=True)
        return jnp.asarray(sum((jnp.nan_to_num(x, neginf=0) * y).sum() for x, y in pairs))

    return jax.value_and_grad(loss, (0, 1, 2, 3))(*arrays)
