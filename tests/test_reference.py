"""The oracle against definitions even simpler than itself: loops, and jax.nn where it agrees."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from masks import documents, ints

from jax_fa3 import _reference


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "local_window_size": (1, 2)},
        {"local_window_size": (0, 1), "query_offset": ints(2, -1)},
        {"is_causal": True, "query_seq_lengths": ints(2, 9)},
        {"key_value_seq_lengths": ints(3, 0)},
        {"local_window_size": (2, 0), "key_value_seq_lengths": ints(3, 5)},
    ],
)
def test_is_jax_nn(arguments: dict[str, Any]):
    """In rows that see a key; jax.nn gives others the mean of value."""
    q, k, v = Case("small", 4, 6, H=8).inputs(jnp.float32)
    rng = np.random.default_rng(0)
    bias = jnp.asarray(rng.standard_normal((2, 4, 4, 6), np.float32))
    mask = jnp.asarray(rng.random((1, 4, 4, 6)) < 0.8)
    offset = arguments.pop("query_offset", 0)
    named = {**arguments, "scale": 0.3, "bias": bias, "mask": mask}
    found, lse = _reference.attention(q, k, v, query_offset=offset, **named)
    if np.any(offset):  # jax.nn has no offset: rows further down, one batch entry at a time
        del named["local_window_size"]
        visible, _ = _reference.visible_keys(2, 4, 6, query_offset=offset, **arguments)
        named["mask"] = mask & visible[:, None]
    wanted, wanted_lse = jax.nn.dot_product_attention(q, k, v, return_residual=True, **named)
    sees = lse != -jnp.inf
    assert sees.sum() > 10
    np.testing.assert_allclose(found[sees], wanted[sees], atol=1e-5)
    np.testing.assert_allclose(lse[sees], wanted_lse[sees], atol=1e-5)
    assert not found[~sees].any()


def test_visible_keys():
    """Every argument at once, by loops over Python's integers."""
    window, offset = (2**40 + 2, 3 - 2**40), 2**40 - 1
    begin, end = np.random.default_rng(0).integers(-3, 9, (2, 2, 6)).astype(np.int32)
    query_lengths, lengths = ints(5, 2**31 - 1), ints(6, -1)
    ids = documents(2, 1, 3, ids=(0, -1, 5)), documents(1, 2, 4, ids=(3, 0, 5))
    found, broken = _reference.visible_keys(
        2,
        6,
        7,
        local_window_size=window,
        query_offset=offset,
        query_segment_ids=ids[0],
        key_value_segment_ids=ids[1],
        key_begin=begin,
        key_end=end,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=lengths,
    )
    assert found.any() and not broken.any()
    for b, i, j in itertools.product(range(2), range(6), range(7)):
        wanted = (
            i + offset - window[0] <= j <= i + offset + window[1]
            and ids[0][i] == ids[1][j] >= 0
            and begin[b, i] <= j < end[b, i]
            and i < query_lengths[b]
            and j < lengths[b]
        )
        assert found[b, i, j] == wanted


def test_broken_segment():
    """NaN in results and gradients of its rows, and of nothing else."""
    q, k, v = Case("small", 4, 4, N=2, K=1, H=8, B=1).inputs(jnp.float32)
    ids = {"query_segment_ids": ints([0, 1, 1, 2]), "key_value_segment_ids": ints([1, 0, 1, 2])}

    def call(*x: jax.Array) -> Any:
        return _reference.attention(*x, **ids)

    (out, lse), pullback = jax.vjp(call, q, k, v)
    dq, dk, dv = pullback((jnp.ones_like(out), jnp.ones_like(lse)))
    rows = ids["query_segment_ids"][0] == 1
    for x in (out, dq, lse[..., None]):
        np.testing.assert_array_equal(np.isnan(x)[0].all((-2, -1)), rows)
        np.testing.assert_array_equal(np.isnan(x)[0].any((-2, -1)), rows)
    assert np.isfinite(dk).all() and np.isfinite(dv).all()
