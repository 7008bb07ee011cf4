"""Dropout in our Flax layers, and in Flax's own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close

from jax_fa3.flax import linen, make_attention_fn
from jax_fa3.flax import nnx as our_nnx

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 32)), jnp.float32)
RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


def test_linen_layer():
    layer = linen.MultiHeadAttention(4, dropout_rate=0.5)
    variables = layer.init(RNGS, X, deterministic=True)
    plain: Any = linen.MultiHeadAttention(4).apply(variables, X)
    assert_close(layer.apply(variables, X, deterministic=True), plain, 1e-5)
    assert_close(layer.clone(deterministic=True).apply(variables, X), plain, 1e-5)
    rng: Any = {"rngs": {"dropout": jax.random.key(1)}}
    out = layer.apply(variables, X, deterministic=False, **rng)
    assert_close(out, layer.apply(variables, X, deterministic=False, **rng), 1e-5)
    assert float(jnp.abs(jnp.asarray(out) - plain).max()) > 0.01
    with pytest.raises(ValueError, match="^deterministic: got None, wanted True or False"):
        layer.apply(variables, X, **rng)


def test_nnx_layer():
    plain = our_nnx.MultiHeadAttention(4, 32, rngs=nnx.Rngs(0))
    layer = our_nnx.MultiHeadAttention(4, 32, dropout_rate=0.5, rngs=nnx.Rngs(0))
    assert_close(layer(X, deterministic=True), plain(X), 1e-5)
    out = layer(X, deterministic=False, rngs=nnx.Rngs(dropout=1))
    assert_close(out, layer(X, deterministic=False, rngs=nnx.Rngs(dropout=1)), 1e-5)
    assert float(jnp.abs(out - plain(X)).max()) > 0.01
    with pytest.raises(ValueError, match="^rngs: got None, wanted flax.nnx.Rngs"):
        layer(X, deterministic=False)


def test_in_flax_layers():
    layer = nn.MultiHeadDotProductAttention(4, dropout_rate=0.5, attention_fn=make_attention_fn())
    variables = layer.init(RNGS, X, deterministic=True)
    rngs: Any = {"rngs": {"dropout": jax.random.key(1)}}
    out = layer.apply(variables, X, deterministic=False, **rngs)
    plain: Any = layer.apply(variables, X, deterministic=True)
    assert float(jnp.abs(jnp.asarray(out) - plain).max()) > 0.01
    theirs = nnx.MultiHeadAttention(
        4, 32, dropout_rate=0.5, decode=False, attention_fn=make_attention_fn(), rngs=nnx.Rngs(0)
    )
    out = theirs(X, deterministic=False, rngs=nnx.Rngs(dropout=1))
    assert float(jnp.abs(out - theirs(X, deterministic=True)).max()) > 0.01
    with pytest.raises(ValueError, match="^dropout_rate: got one, wanted none: the layer"):
        make_attention_fn(dropout_rate=0.1)
