"""Our linen and nnx layers, made and called alike, for tests of both."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from masks import documents

import jax_fa3.flax

B, T, N, K, H, FEATURES = 2, 12, 4, 2, 8, 24
X = jax.random.normal(jax.random.key(0), (B, T, FEATURES))
CAUSAL = nn.make_causal_mask(X[..., 0])
SIZES: Any = {"num_heads": N, "qkv_features": N * H}
IDS = np.stack([documents(5, 7), documents(3, 4, 5)])


class Linen:
    """A linen layer with its variables, called as an nnx layer is."""

    def __init__(self, layer: Any, inputs: Any = X):
        self.layer = layer
        self.variables = jax.jit(layer.init)(jax.random.key(1), inputs)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        out, changed = self.layer.apply(self.variables, *inputs, **options, mutable=["cache"])
        self.variables = self.variables | changed
        return out


def make(api: str, **options: Any) -> Any:
    """One of our layers, of random parameters that depend on sizes alone; decode: with a cache."""
    options = SIZES | {"is_causal": True} | options
    if api == "linen":
        return Linen(jax_fa3.flax.linen.MultiHeadAttention(**options))
    layer = jax_fa3.flax.nnx.MultiHeadAttention(in_features=FEATURES, rngs=nnx.Rngs(1), **options)
    if options.get("decode"):
        layer.init_cache(X.shape)
    return layer


both = pytest.mark.parametrize("api", ["linen", "nnx"])


def close(x: Any, y: Any) -> None:
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(initial=1))


def value_and_grads(function: Any, *arguments: Any) -> Any:
    def loss(*arguments):
        out = function(*arguments)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    return jax.jit(jax.value_and_grad(loss, range(len(arguments)), has_aux=True))(*arguments)
