"""What passes for integers, and in which shapes; that other values are refused is test_arguments."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa3 import _arguments, _checks
from jax_fa3._problem import Sizes

T = 16
SIZES = Sizes(2, T, 24, 4, 2, 64, 64)


@pytest.mark.parametrize(
    "lengths",
    [
        [3, 4],
        (3, 4),
        np.array([3, 4]),
        np.array([3, 4], np.uint64),
        jnp.array([3, 4], jnp.int8),
        jnp.array([3, 4], jnp.uint16),
    ],
)
def test_integers_become_int32(lengths):
    masks, _, _ = _arguments.parse_masks(SIZES, True, query_seq_lengths=lengths)
    assert masks.query_seq_lengths is not None and masks.query_seq_lengths.dtype == jnp.int32
    np.testing.assert_array_equal(masks.query_seq_lengths, [3, 4])


def test_empty_list_is_integers():
    sizes = SIZES._replace(batch=0)
    masks, _, _ = _arguments.parse_masks(sizes, True, query_seq_lengths=[])
    assert masks.query_seq_lengths is not None and masks.query_seq_lengths.shape == (0,)


@pytest.mark.parametrize("lengths", [5, [5], np.int64(5), jnp.int32(5), jnp.array([5])])
def test_without_batch_axis(lengths):
    masks, _, _ = _arguments.parse_masks(
        SIZES._replace(batch=1), False, query_seq_lengths=lengths, key_end=np.arange(T)
    )
    np.testing.assert_array_equal(masks.query_seq_lengths, [5])
    np.testing.assert_array_equal(masks.key_end, np.arange(T)[None])


def test_integers_of_any_size():
    assert _checks.integer("x", np.array(3)) == 3
    assert _checks.integer("x", -(10**30)) == -(10**30)
    for x in (1.0, True, np.array([1, 2]), np.array(1.0), jnp.int32(1), "1", None):
        with pytest.raises(ValueError, match="x: got .*, wanted a static int"):
            _checks.integer("x", x)
