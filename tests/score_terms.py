"""Terms of the scores that heads have, ALiBi's slopes and a bias by distance, in the tests."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from biases import with_gradients
from cases import CAUSAL, Case
from distances import assert_table, table_of
from helpers import assert_rounded, both_oracles, poison
from jax import Array
from slopes import assert_slopes, slopes_of

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


TERMS = "alibi_slopes", "relative_bias"
oracles = jax.jit(both_oracles, static_argnums=(0, 1))


def term_of(name: str, case: Case) -> Array:
    return slopes_of(case.N) if name == "alibi_slopes" else table_of(case, 100)


def assert_gradient(name: str, found: Any, case: Case, arrays: Any, cotangents: Any) -> None:
    assert_right = assert_slopes if name == "alibi_slopes" else assert_table
    assert_right(found, case, arrays, cotangents)


def kernels(name: str, case: Case, **options: Any) -> Any:
    """The kernels' attention, of query, key, value and the term."""
    arguments = case.arguments | options

    def call(q: Any, k: Any, v: Any, term: Any) -> Any:
        return attention(q, k, v, implementation="fa3", **{name: term}, **arguments)

    return call


def check(name: str, case: Case, arrays: Any, call: Any = None, **options: Any) -> Any:
    """By the tolerance rule; call: in place of `kernels`."""
    dtype, cotangents = arrays[0].dtype, case.cotangents(arrays[0].dtype)
    poison(case, dtype)
    call = call or kernels(name, case, **options)
    found = jax.jit(functools.partial(with_gradients, call))(cotangents, *arrays)
    given = dataclasses.replace(case, mask={**case.mask, name: arrays[3]})
    exact, rounded = oracles(given, dtype, arrays[:3], cotangents)
    assert_rounded(found.results, exact, rounded, case, jnp.finfo(dtype).eps)
    if not case.planted:
        assert_gradient(name, found.dbias, case, arrays, cotangents)
    else:
        assert np.isfinite(found.dbias).all()
    return found
