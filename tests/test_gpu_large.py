"""Operands with more than 2**31 elements, on a Hopper GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, Case
from helpers import Results, assert_rounded, both_oracles, equal
from jax import Array
from masks import ints

import jax_fa3
from jax_fa3 import kv_cache

pytestmark = pytest.mark.gpu

attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)


@jax.jit
def _normal(keys: Array) -> Array:
    """[len(keys), 4096, 32, 128], made entry by entry."""
    return jax.lax.map(lambda key: jax.random.normal(key, (4096, 32, 128), jnp.bfloat16), keys)


both = jax.jit(both_oracles, static_argnums=(0, 1))


def test_more_than_2_to_the_31_elements():
    """Entries on both sides of element 2**31, against themselves alone and against the oracle."""
    q, k, v = (_normal(jax.random.split(jax.random.key(i), 130)) for i in range(3))
    assert q.size > 2**31
    call = jax.jit(functools.partial(attention, **CAUSAL))
    out, lse = call(q, k, v)
    case = Case("2**31", 4096, 4096, 2, 2, 128, B=1, mask=CAUSAL)
    for entry in (0, 63, 127, 128, 129):
        alone = [x[entry : entry + 1] for x in (q, k, v)]
        found = out[entry : entry + 1], lse[entry : entry + 1]
        assert equal(found, call(*alone))
        heads = ints(0, 31)
        exact, rounded = both(case, jnp.bfloat16, [x[:, :, heads] for x in alone])
        results = Results(*(x[:, :, heads] for x in found))
        assert_rounded(results, exact, rounded, case, jnp.finfo(jnp.bfloat16).eps)


def test_more_than_2_to_the_31_elements_in_one_sequence():
    """The last rows of 2**19 + 100, in a window, against the oracle of the last rows alone."""
    length, last, window = 2**19 + 100, 200, 150
    x = _normal(jax.random.split(jax.random.key(0), 129)).reshape(1, -1, 32, 128)[:, :length]
    assert x.size > 2**31
    out, lse = jax.jit(lambda x: attention(x, x, x, local_window_size=(window, 0)))(x)
    found = Results(out[:, -last:, 30:], lse[:, -last:, 30:])
    keys = x[:, -last - window :, 30:]
    mask = {"local_window_size": (window, 0), "query_offset": window}
    case = Case("long tail", last, last + window, 2, 2, 128, B=1, mask=mask)
    exact, rounded = both(case, jnp.bfloat16, [x[:, -last:, 30:], keys, keys])
    assert_rounded(found, exact, rounded, case, jnp.finfo(jnp.bfloat16).eps)


def test_gradients_of_more_than_2_to_the_31_elements():
    """cuDNN 9.19's are silently wrong here, past element 2**31."""
    q, k, v = (_normal(jax.random.split(jax.random.key(i), 130)) for i in range(3))

    @jax.jit
    def gradients(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        def loss(q: Array, k: Array, v: Array) -> Array:
            out = jax_fa3.dot_product_attention(q, k, v, is_causal=True, implementation="fa3")
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    found = gradients(q, k, v)
    for entry in (0, 127, 128, 129):
        alone = gradients(*(x[entry : entry + 1] for x in (q, k, v)))
        for i in (1, 2):  # dq is summed in any order
            assert equal(found[i][entry : entry + 1], alone[i])
        error = jnp.abs(found[0][entry].astype(jnp.float32) - alone[0][0].astype(jnp.float32))
        assert error.max() <= 0.01 * jnp.abs(alone[0]).max().astype(jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_pages_of_more_than_2_to_the_31_elements(dtype: Any):
    """Pages on both sides of element 2**31, against the same ones in a pool of their own."""
    pages, shape = 2**17 + 500, (16, 8, 128)
    last = pages - 1
    table = np.array([[0, 2**17 - 1, 2**17, last, 70_000], [2**17 + 3, 1, last - 1, 5, 90_000]])
    keys = jax.random.split(jax.random.key(0), 5)
    own = [jax.random.normal(k, (table.size, *shape), jnp.bfloat16).astype(dtype) for k in keys[:2]]
    query = jax.random.normal(keys[2], (2, 3, 32, 128), jnp.bfloat16)
    names = ["key_cache", "value_cache"]
    if dtype != jnp.bfloat16:
        names += ["key_scale", "value_scale"]
        own += [jax.random.uniform(k, (table.size, *shape[:2]), jnp.float32) for k in keys[3:]]
    large = [jnp.zeros((pages, *x.shape[1:]), x.dtype).at[table.ravel()].set(x) for x in own]
    assert large[0].size > 2**31

    def results(arrays: Any, table: np.ndarray) -> Any:
        given = {**dict(zip(names, arrays, strict=True)), "page_table": table}
        lengths = np.array([75, 80])
        attend: Any = functools.partial(kv_cache.dot_product_attention, return_residual=True)
        return attend(query, key_value_seq_lengths=lengths, implementation="fa3", **given)

    assert equal(results(large, table), results(own, np.arange(table.size).reshape(table.shape)))
