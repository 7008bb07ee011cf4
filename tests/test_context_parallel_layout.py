"""The zigzag order, the intervals of one part of the keys, and the merging of results."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from masks import documents, ints, packed, scattered

import jax_fa3
from jax_fa3 import _mask
from jax_fa3._problem import Masks, Sizes
from jax_fa3.context_parallel import _masks, from_zigzag, merge, to_zigzag, zigzag_positions
from jax_fa3.context_parallel._layout import Layout


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_zigzag(array):
    x = array(np.arange(2 * 12 * 3).reshape(2, 12, 3))
    order = [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    np.testing.assert_array_equal(to_zigzag(x, 3), x[:, np.array(order)])
    assert isinstance(to_zigzag(x, 3), type(x))
    np.testing.assert_array_equal(from_zigzag(to_zigzag(x, 3), 3), x)
    np.testing.assert_array_equal(from_zigzag(to_zigzag(x.T, 3, axis=-2), 3, axis=1), x.T)
    np.testing.assert_array_equal(zigzag_positions(12, 3), order)
    np.testing.assert_array_equal(to_zigzag(x, 1), x)


@pytest.mark.parametrize(
    ("length", "size", "axis", "message"),
    [
        (10, 2, 1, r"x: got length 10 along axis 1, wanted a multiple of 2 \* axis_size = 4"),
        (8, 0, 1, "x: got length 8 along axis 1, wanted a multiple"),
        (8, -2, 1, "axis_size: got -2, wanted an int >= 0"),
        (8, 2.0, 1, "axis_size: got 2.0, wanted a static int"),
        (8, 2, 3, r"axis: got 3, wanted one of the 3 axes of x \(1, 8, 2\)"),
    ],
)
def test_zigzag_errors(length, size, axis, message):
    for function in (to_zigzag, from_zigzag):
        with pytest.raises(ValueError, match=message):
            function(np.zeros((1, length, 2)), size, axis=axis)


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("kind", ["window", "intervals", "broken", "lengths"])
def test_every_part_is_one_interval(zigzag: bool, kind: str, monkeypatch):
    """Brute force: over all devices, what each sees of each other's keys is what the whole mask
    says, and it is one interval per row."""
    size, rows, keys = 4, 8, 12
    layout = Layout("sp", size, zigzag)
    T, S = size * rows, size * keys
    masks: Any = Masks()
    window: Any = (None, None)
    if kind == "window":
        masks, window = masks._replace(query_offset=ints(3)), (13, 5)
    elif kind == "intervals":
        masks = masks._replace(**scattered(1, T, S, 5))
    elif kind == "broken":
        ids = packed(documents(5, 11, 3, 13), documents(9, 7, 20, 12, ids=(1, 2, 1, 3)))
        begin, end = _mask.segment_intervals(*map(jnp.asarray, ids.values()))
        masks = masks._replace(key_begin=begin, key_end=end)
    else:
        lengths = {"query_seq_lengths": ints(21), "key_value_seq_lengths": ints(2**31 - 1)}
        masks = masks._replace(**lengths, key_begin=ints([0] * T), key_end=ints([37] * T))
    visible = seen(masks, window, T, S)
    order = np.asarray(to_zigzag(np.arange(T), size, axis=0)) if zigzag else np.arange(T)
    key_order = to_zigzag(np.arange(S), size, axis=0) if zigzag else np.arange(S)
    for device in range(size):
        monkeypatch.setattr(Layout, "device", lambda self, back=0, i=device: jnp.int32(i))
        mine = order[device * rows : (device + 1) * rows]
        local = masks._replace(
            key_begin=None if masks.key_begin is None else masks.key_begin[:, mine],
            key_end=None if masks.key_end is None else masks.key_end[:, mine],
        )
        sizes = Sizes(1, rows, keys, 0, 0, 0, 0)
        local = _masks.of_this_device("xla", layout, local, window, None, sizes)
        for other in range(size):
            part = _masks.of_one_part(layout, local, jnp.int32(other), keys)
            theirs = key_order[other * keys : (other + 1) * keys]
            found = seen(part, (None, None), rows, keys)
            np.testing.assert_array_equal(found, visible[np.ix_(mine, theirs)])


def seen(masks: Masks, window: Any, rows: int, keys: int) -> np.ndarray:
    """[rows, keys] of 0 and 1, and 2 in the rows of broken segments."""
    begin, end, broken = (
        np.asarray(x)[0] for x in _mask.row_intervals(masks, window, 1, rows, keys)
    )
    positions = np.arange(keys)
    visible = (begin[:, None] <= positions) & (positions < end[:, None])
    return visible + 2 * broken[:, None]


QUERY, KEY, VALUE = (jax.random.normal(jax.random.key(i), (2, 6, 4, 8)) for i in range(3))
attention = functools.partial(
    jax_fa3.dot_product_attention, return_residual=True, implementation="xla"
)


def in_parts(query, key, value, end):
    """Of the keys before `end` in three parts, one of which nobody sees."""
    ends = np.clip(np.full((2, 6), end) - [[[0]], [[2]], [[6]]], 0, 4)
    parts = [
        attention(query, key[:, x], value[:, x], key_end=e)
        for x, e in zip((slice(0, 2), slice(2, 6), slice(0, 3)), ends, strict=True)
    ]
    return merge(*zip(*parts, strict=True))


@pytest.mark.parametrize("end", [0, 1, 5])
def test_merge(end):
    """Its results and gradients, none of them NaN where nothing is seen."""

    def whole(*qkv):
        return attention(*qkv, key_end=np.full((2, 6), end))

    def loss(function):
        def scalar(*qkv):
            out, lse = function(*qkv)
            return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

        return jax.jit(jax.value_and_grad(scalar, (0, 1, 2)))

    parts = functools.partial(in_parts, end=end)
    for x, y in zip(parts(QUERY, KEY, VALUE), whole(QUERY, KEY, VALUE), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
    found, exact = (loss(f)(QUERY, KEY, VALUE) for f in (parts, whole))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_merge_keeps_dtypes_nan_and_takes_stacks():
    outs = jnp.ones((3, 2, 1, 4), jnp.bfloat16)
    lses = jnp.array([[[0.0], [1]], [[jnp.nan], [-jnp.inf]], [[1], [80]]])
    out, lse = merge(outs, lses)
    assert (out.dtype, lse.dtype, out.shape, lse.shape) == (
        "bfloat16",
        "float32",
        (2, 1, 4),
        (2, 1),
    )
    assert jnp.isnan(out[0]).all() and jnp.isnan(lse[0]).all()
    np.testing.assert_allclose(out[1], 1)
    np.testing.assert_allclose(lse[1], 80)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "lses: got 0 for 0 outs, wanted one for each out, at least one"),
        ([(2, 1, 4)], [], "lses: got 0 for 1 outs"),
        ([(2, 1, 4), (2, 1, 8)], [(2, 1)] * 2, r"outs: got shapes \(2, 1, 4\) and \(2, 1, 8\)"),
        ([(2, 1, 4)], [(1, 2)], r"lses: got shape \(1, 2\), wanted \(2, 1\) for out \(2, 1, 4\)"),
    ],
)
def test_merge_errors(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        merge([jnp.zeros(x) for x in outs], [jnp.zeros(x) for x in lses])
