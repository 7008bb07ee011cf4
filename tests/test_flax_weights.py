"""sow_weights in Flax's own layers with make_attention_fn, against Flax's own function."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import linen as nn
from flax import nnx

from jax_fa3.flax import make_attention_fn

B, T, N, H, FEATURES = 2, 12, 4, 8, 24
X = jax.random.normal(jax.random.key(0), (B, 3, T, FEATURES))
CAUSAL = nn.make_causal_mask(X[..., 0])


def linen_layer(dropout_rate: float = 0.0, **options: Any) -> Any:
    return nn.MultiHeadDotProductAttention(N, dropout_rate=dropout_rate, **options)


@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["none", "causal"])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.5])
def test_linen(mask, dropout_rate):
    """Before dropout, over several batch axes; the result is what it is without."""
    own, ours = (
        linen_layer(dropout_rate, **x) for x in ({}, {"attention_fn": make_attention_fn()})
    )
    variables = own.init(jax.random.key(1), X, deterministic=True)
    arguments: dict[str, Any] = {"mask": mask, "rngs": {"dropout": jax.random.key(2)}}
    call: dict[str, Any] = {"deterministic": False, "mutable": ["intermediates"]}
    stored = []
    for layer in (own, ours):
        out, state = layer.apply(variables, X, sow_weights=True, **arguments, **call)
        stored.append(state["intermediates"]["attention_weights"][0])
    np.testing.assert_allclose(stored[1], stored[0], atol=1e-6)
    assert stored[1].shape == (B, 3, N, T, T)
    plain = ours.apply(variables, X, deterministic=False, **arguments)
    np.testing.assert_array_equal(out, plain)
    dropped = ours.apply(variables, X, sow_weights=True, deterministic=False, **arguments)
    np.testing.assert_array_equal(dropped, plain)


def test_nnx():
    make: Any = functools.partial(nnx.MultiHeadAttention, N, FEATURES, N * H, decode=False)
    layers = make(rngs=nnx.Rngs(0)), make(rngs=nnx.Rngs(0), attention_fn=make_attention_fn())
    stored = []
    for layer in layers:
        with warnings.catch_warnings():  # Flax warns of its own sow
            warnings.simplefilter("ignore", DeprecationWarning)
            layer(X, mask=CAUSAL, sow_weights=True)
        stored.append(jnp.asarray(nnx.pop(layer, nnx.Intermediate)["attention_weights"][0]))
    np.testing.assert_allclose(stored[1], stored[0], atol=1e-6)


def test_of_the_options():
    """The weights are those of the function's own masks, which the layer does not know."""
    fn = make_attention_fn(local_window_size=2, is_causal=True)
    layer = linen_layer(attention_fn=fn)
    variables = layer.init(jax.random.key(1), X)
    _, state = layer.apply(variables, X, sow_weights=True, mutable=["intermediates"])
    (weights,) = state["intermediates"]["attention_weights"]
    rows, keys = np.ogrid[:T, :T]
    seen = (keys <= rows) & (keys >= rows - 2)
    np.testing.assert_array_equal(weights != 0, np.broadcast_to(seen, weights.shape))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
