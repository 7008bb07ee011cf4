"""For tests of vmap over the query alone: a case's key and value with M queries, and what is right."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from helpers import ROWS, Results, assert_rounded, both_oracles, with_gradients
from meshes import DTYPE

import jax_fa3

M = 4


def inputs(case: Case) -> tuple[tuple[Any, Any, Any], Any]:
    """query [M, ...], key and value, of several means and scales; cotangents [M, ...]."""
    query, key, value = case.inputs(DTYPE)
    queries = jnp.stack([query * (i + 1) / 2 + i / 4 for i in range(M)])
    cotangents = [case.cotangents(DTYPE, seed) for seed in range(M)]
    return (queries, key / 2 + 1, 2 * value + 1), jax.tree.map(lambda *x: jnp.stack(x), *cotangents)


def attend(case: Case, **options: Any) -> Any:
    """16 bits, so that the call is one that the kernels could take, not JAX's own vmap."""
    return functools.partial(
        jax_fa3.dot_product_attention, **case.arguments, return_residual=True, **options
    )


def apart(case: Case, **options: Any) -> Any:
    """Results and gradients of each entry."""

    def one(query: Any, key: Any, value: Any, cotangents: Any) -> Results:
        return with_gradients(attend(case, **options), cotangents, query, key, value)

    return jax.vmap(one, (0, None, None, 0))


def assert_each_right(found: Results, case: Case) -> None:
    """By the tolerance rule."""
    found = jax.tree.map(np.asarray, found)
    for i, (exact, rounded) in enumerate(_oracles(case)):
        entry = jax.tree.map(lambda x, i=i: x[i], found)
        # All rows of a head: of few the rounded oracle is as exact as it is by luck. (Of six rows that the
        # kernels had outside of twice its error by a tenth, one reference for the weights in 36 has so.)
        assert_rounded(entry, exact, rounded, case, jnp.finfo(DTYPE).eps, max(ROWS, case.T))


@functools.cache
def _oracles(case: Case) -> list[tuple[Results, Results]]:
    (queries, key, value), cotangents = inputs(case)
    oracles = jax.jit(functools.partial(both_oracles, case, DTYPE))
    of_entries = [jax.tree.map(lambda x, i=i: x[i], (queries, cotangents)) for i in range(M)]
    return [oracles((query, key, value), given) for query, given in of_entries]
