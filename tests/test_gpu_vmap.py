"""vmap on the GPU: over the query alone, and over an axis that a mesh of one device splits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from entries import M, apart, assert_each_right, attend, inputs
from helpers import equal, temporary_bytes, with_gradients
from jax.sharding import PartitionSpec as P
from meshes import AUTO, EXPLICIT, make_mesh, put

import jax_fa3

pytestmark = pytest.mark.gpu

LENGTHS = np.array([33, 250], np.int32)
CASES = [
    Case("per sample", 33, 33, 4, 2, 64, B=1),  # the issue's
    Case("longer keys", 70, 260, 6, 3, 128, mask={"is_causal": True, "query_offset": 190}),
    Case("padding", 3, 260, 4, 1, 64, mask={"key_value_seq_lengths": LENGTHS}, planted=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", [None, AUTO, EXPLICIT])
def test_gradients_of_each_entry(kind, case):
    tensors, cotangents = inputs(case)
    operands = *tensors, cotangents
    if kind is not None:
        where = P("x"), P(), P(), (P("x"), P("x"))
        operands = put(make_mesh(kind, platform="cuda", x=1), operands, where)
    assert_each_right(jax.jit(apart(case, implementation="fa3"))(*operands), case)


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_forward_as_of_one_entry(case):
    """A head is computed alike wherever that happens."""
    (queries, key, value), _ = inputs(case)
    one = attend(case, implementation="fa3")
    found = jax.jit(jax.vmap(one, (0, None, None)))(queries, key, value)
    for i in range(M):
        entry = jax.tree.map(lambda x, i=i: x[i], found)
        assert equal(entry, jax.jit(one)(queries[i], key, value))


def test_gradients_in_turn():
    """As of each entry by itself: keys and values of 64 MiB."""
    case = Case(
        "many keys", 40, 2**15, 8, 4, 128, B=1, mask={"is_causal": True, "query_offset": 9000}
    )
    (queries, key, value), cotangents = inputs(case)
    operands = queries, key, value, cotangents
    found = jax.jit(apart(case, implementation="fa3"))(*operands)

    def one(query, key, value, cotangents):
        return with_gradients(attend(case, implementation="fa3"), cotangents, query, key, value)

    for i in range(M):
        own = jax.tree.map(lambda x, i=i: x[i], (queries, cotangents))
        exact = jax.jit(one)(own[0], key, value, own[1])
        entry = jax.tree.map(lambda x, i=i: x[i], found)
        assert equal(entry[:2], exact[:2])
        for x, y in zip(entry[2:], exact[2:], strict=True):  # sums in any order
            x, y = (np.asarray(z, np.float32) for z in (x, y))
            np.testing.assert_allclose(x, y, atol=8e-3 * np.abs(y).max())


def test_keys_are_not_copied():
    """64 entries of 32 MiB of keys and values: 2 GiB when they were."""
    query = jax.ShapeDtypeStruct((64, 1, 64, 8, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 8192, 8, 128), jnp.bfloat16)
    call = functools.partial(jax_fa3.dot_product_attention, implementation="fa3")
    assert temporary_bytes(jax.vmap(call, (0, None, None)), query, key, key) <= 32 * 2**20

    def loss(query, key, value):
        return jnp.sin(call(query, key, value).astype(jnp.float32)).sum()

    gradients = jax.vmap(jax.grad(loss, (1, 2)), (0, None, None))
    # Of 2 GiB of results, which are not counted.
    assert temporary_bytes(gradients, query, key, key) <= 128 * 2**20
