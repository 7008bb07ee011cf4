"""The arrangements of query, key and value: what is read from each, and that it is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa3._operands import Operands, Rows, batch_letters
from jax_fa3._problem import Masks, Sizes

B, T, S, N, K, H, V = 2, 5, 7, 4, 2, 8, 16


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


SEPARATE = Operands(normal(B, T, N, H), normal(B, S, K, H, seed=1), normal(B, S, K, V, seed=2))
PACKED = Operands(normal(B, T, 3, N, H), packed=(N, N))
GROUPED = Operands(normal(B, T, N + 2 * K, H), packed=(N, K))
TOGETHER = Operands(normal(B, T, N, H), normal(B, S, K, H + V, seed=1))

ALL = {"separate": SEPARATE, "packed": PACKED, "grouped": GROUPED, "side by side": TOGETHER}


@pytest.mark.parametrize("name", ALL)
def test_located_is_what_split_gives(name: str):
    """For the kernels no copy; the same numbers."""
    operands = ALL[name]
    sizes, located = operands.sizes, operands.located()
    heads = sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads
    dims = sizes.head_dim, sizes.head_dim, sizes.head_dim_v
    columns = 0, 0, located.first_column_v
    places = zip(located.arrays.values(), located.first_heads, heads, columns, dims, strict=True)
    parts = operands.split()
    for part, (array, head, count, column, dim) in zip(parts, places, strict=True):
        np.testing.assert_array_equal(part, array[:, :, head : head + count, column : column + dim])
    assert sizes[1:3] == (parts[0].shape[1], parts[1].shape[1]) and sizes.batch == B
    assert operands.heads == heads[:2]
    if name != "side by side":
        (leaves, tree) = jax.tree.flatten(operands)
        for x, y in zip(leaves, operands.joined(*parts), strict=True):
            np.testing.assert_array_equal(x, y)
        assert jax.tree.unflatten(tree, leaves).sizes == sizes


def test_sizes():
    assert SEPARATE.sizes == Sizes(B, T, S, N, K, H, V)
    assert PACKED.sizes == Sizes(B, T, T, N, N, H, H)
    assert GROUPED.sizes == Sizes(B, T, T, N, K, H, H)
    assert TOGETHER.sizes == Sizes(B, T, S, N, K, H, V)
    part = Operands(PACKED.query[:, :, :, :1], packed=PACKED.packed)  # of one device
    assert part.heads == (1, 1) and part.split()[2].shape == (B, T, 1, H)


def test_letters():
    """One string per array, of as many letters as it has dimensions."""
    for operands in ALL.values():
        ranks = jax.tree.map(len, operands.letters)
        assert ranks == jax.tree.map(jnp.ndim, operands)
    assert jax.tree.leaves(SEPARATE.letters) == ["btnh", "b.k.", "b.k."]
    assert SEPARATE.result_letters == ("btn.", "bnt") and PACKED.result_letters == ("btnh", "bnt")
    assert GROUPED.result_letters == ("bt.h", "b.t")  # three kinds of heads are not split
    dense = Operands(*SEPARATE.split(), bias=normal(1, N, 1, S), scale=jnp.float32(2))
    assert jax.tree.leaves(dense.letters)[3:] == [".n..", ""]
    rows = Rows(None, normal(B, N, T), normal(B, T, N, V), normal(B, N, T))
    assert jax.tree.leaves(rows.letters(SEPARATE)) == ["bnt", "btn.", "bnt"]
    masks = Masks(query_offset=jnp.zeros(1), key_begin=jnp.zeros((B, T)))
    assert jax.tree.leaves(batch_letters(masks, B)) == [".", "b."]
