"""Flax's masks as intervals, against the masks themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import linen as nn

import jax_fa3
from jax_fa3._broken import is_broken
from jax_fa3.flax import mask_to_intervals

B, T, S = 2, 6, 9
TOKENS = jnp.ones((B, T))
LEFT = jnp.arange(T) >= jnp.array([[2], [0]])
RIGHT = jnp.arange(T) < jnp.array([[6], [4]])
CAUSAL = nn.make_causal_mask(TOKENS)
ONE_INTERVAL = {
    "causal": CAUSAL,
    "causal, bool": nn.make_causal_mask(TOKENS, dtype=bool),
    "left padding": nn.make_attention_mask(LEFT, LEFT),
    "right padding": nn.make_attention_mask(RIGHT, RIGHT),
    "causal, left padding": nn.combine_masks(CAUSAL, nn.make_attention_mask(LEFT, LEFT)),
    "decode": jnp.broadcast_to(jnp.arange(S) <= 3, (B, 1, 1, S)).astype(jnp.float32),
    "nothing": jnp.zeros((B, 1, T, S)),
    "everything": jnp.ones((1, T, S), jnp.int32),
    "no keys": jnp.ones((B, 1, T, 0)),
}


@pytest.mark.parametrize("name", ONE_INTERVAL)
def test_is_the_mask(name):
    mask = ONE_INTERVAL[name]
    begin, end = jax.jit(mask_to_intervals)(mask)
    assert begin.shape == end.shape == (*mask.shape[:-3], mask.shape[-2])
    assert begin.dtype == end.dtype == jnp.int32
    keys = np.arange(mask.shape[-1])
    visible = (begin[..., None] <= keys) & (keys < end[..., None])
    np.testing.assert_array_equal(visible[..., None, :, :], np.asarray(mask) != 0)
    empty = ~visible.any(-1)
    assert not begin[empty].any() and not end[empty].any()


@pytest.mark.parametrize("dtype", [bool, np.float32, np.int32])
def test_brute_force(dtype):
    """All masks of a row of 5 keys."""
    masks = (np.arange(32)[:, None] >> np.arange(5)) % 2
    begin, end = mask_to_intervals(masks[None].astype(dtype))
    broken = np.asarray(is_broken(begin, end))
    for row, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        where = np.flatnonzero(masks[row])
        assert broken[row] == bool(len(where) and where[-1] + 1 - where[0] != len(where))
        if not broken[row]:
            assert list(range(first, last)) == list(where)
    assert 0 < broken.sum() < 32


@pytest.mark.parametrize("value", [0.5, -1.0, np.nan, -np.inf, 2.0])
def test_other_numbers_are_broken(value):
    """Above all an additive mask, 0 and -inf, which Flax would take for its opposite."""
    begin, end = mask_to_intervals(jnp.ones((1, T, S)).at[0, 1, 4].set(value))
    assert list(is_broken(begin, end)) == [row == 1 for row in range(T)]


def test_broken_rows_are_nan():
    mask = CAUSAL.at[0, 0, 4, 2].set(0)
    begin, end = mask_to_intervals(mask)
    x = jnp.ones((B, T, 1, 8))
    out = jax_fa3.dot_product_attention(x, x, x, key_begin=begin, key_end=end)
    nan = np.zeros((B, T), bool)
    nan[0, 4] = True
    np.testing.assert_array_equal(jnp.isnan(out).all((-2, -1)), nan)
    np.testing.assert_array_equal(jnp.isnan(out).any((-2, -1)), nan)


@pytest.mark.parametrize("shape", [(T, S), (S,), (B, 4, T, S)])
def test_refuses(shape):
    with pytest.raises(ValueError, match=r"^mask: got shape .*, wanted \[..., 1, T, S\]"):
        mask_to_intervals(jnp.ones(shape))
