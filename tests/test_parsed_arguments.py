"""What good arguments become."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa3 import _arguments
from jax_fa3._operands import Operands
from jax_fa3._problem import Masks, Sizes

B, T, S, N, K, H = 2, 16, 24, 4, 2, 64
SIZES = Sizes(B, T, S, N, K, H, H)


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


OPERANDS = Operands(zeros(B, T, N, H), zeros(B, S, K, H), zeros(B, S, K, H))


@pytest.mark.parametrize(
    ("arguments", "window", "offset"),
    [
        ({}, (None, None), None),
        ({"is_causal": True}, (None, 0), None),
        ({"local_window_size": 3}, (3, 3), None),
        ({"local_window_size": (3, 5), "is_causal": True}, (3, 0), None),
        ({"local_window_size": (3, -1)}, (3, None), None),
        ({"local_window_size": [None, 5], "query_offset": 2}, (None, 7), None),
        ({"local_window_size": (3, None), "is_causal": True}, (3, 0), None),
        ({"local_window_size": (-1, None)}, (None, None), None),
        ({"local_window_size": -1, "query_offset": jnp.array([4, 5])}, (None, None), None),
        ({"local_window_size": np.int64(3), "query_offset": -7}, (10, -4), None),
        ({"is_causal": True, "query_offset": 10**30}, (None, 10**30), None),
        ({"is_causal": True, "query_offset": np.array(4)}, (None, 4), None),
        ({"is_causal": True, "query_offset": jnp.int32(4)}, (None, 0), [4]),
        ({"is_causal": True, "query_offset": [4, 5]}, (None, 0), [4, 5]),
        ({"query_offset": jnp.array([4, 5])}, (None, None), None),  # nothing depends on it
    ],
)
def test_window(arguments, window, offset):
    masks, found, _ = _arguments.parse_masks(SIZES, True, **arguments)
    assert found == window
    if offset is None:
        assert masks == Masks()
    else:
        assert masks.query_offset is not None and masks.query_offset.tolist() == offset


def test_dense_arguments_get_four_axes():
    found = _arguments.parse(
        OPERANDS, True, bias=zeros(S), mask=zeros(N, T, 1, dtype=bool)
    ).operands
    assert found.bias is not None and found.bias.shape == (1, 1, 1, S)
    assert found.mask is not None and found.mask.shape == (1, N, T, 1)


def test_default_scale():
    assert _arguments.parse(OPERANDS, True).config.scale == 0.125


@pytest.mark.parametrize("kind", [jnp.float32, np.float64, np.asarray, jnp.asarray])
def test_known_scalars_are_static(kind):
    call = _arguments.parse(OPERANDS, True, scale=kind(0.5), logits_soft_cap=0.0)
    config = call.config
    assert (config.scale, call.operands.scale, config.logits_soft_cap) == (0.5, None, None)
