"""The segment kernel and key_intervals on a Hopper GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from helpers import equal
from jax import Array
from masks import documents

import jax_fa3

pytestmark = pytest.mark.gpu

attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 200, 1000), (2, 5000, 3000), (1, 70000, 70000)])
def test_segment_kernel(sizes: tuple[int, int, int]):
    """key_intervals by the kernel and in plain JAX; sorted runs, broken runs, padding."""
    b, t, s = sizes
    rng = np.random.default_rng(t)
    lengths = rng.integers(1, max(2, s // 9), (b, s))
    ids = rng.permuted(np.arange(-3, s - 3)[None].repeat(b, 0), axis=1)
    ids[0, 1:6] = ids[0, 0]  # a broken run, or one that is longer
    key = np.stack([np.repeat(i, n)[:s] for i, n in zip(ids, lengths, strict=True)])
    query = np.take_along_axis(key, rng.integers(0, s, (b, t)), axis=1)
    query[:, ::7] = rng.integers(-(2**31), 2**31, query[:, ::7].shape)
    segments: dict[str, Any] = {
        "query_segment_ids": query.astype(np.int32),
        "key_value_segment_ids": key.astype(np.int32),
    }

    @functools.partial(jax.jit, static_argnums=1)
    def intervals(segments: Any, implementation: Any) -> Any:
        offset = {"is_causal": True, "query_offset": 5}
        return jax_fa3.key_intervals(t, s, **segments, **offset, implementation=implementation)

    for x, y in zip(intervals(segments, "fa3"), intervals(segments, "xla"), strict=True):
        np.testing.assert_array_equal(x, y)


def test_key_intervals_are_the_mask():
    """Passing them on gives what the arguments give; bit by bit, for head dim 128 has one tile for both
    where there are so few keys.
    (Head dim 64 has another for a narrow window, and so other blocks of a warpgroup are full.)"""
    ids = np.stack([documents(300, 700, 24), documents(1, 1000, 23, ids=(7, -1, 3))])
    segments: dict[str, Any] = {"query_segment_ids": ids, "key_value_segment_ids": ids}
    inputs = Case("intervals", 1024, 1024, H=128).inputs(jnp.bfloat16)

    @jax.jit
    def both(*inputs: Array) -> Any:
        begin, end = jax_fa3.key_intervals(1024, 1024, **segments, local_window_size=(200, 0))
        once = attention(*inputs, key_begin=begin, key_end=end)
        return once, attention(*inputs, **segments, local_window_size=(200, 0))

    once, each = both(*inputs)
    assert equal(once, each)
