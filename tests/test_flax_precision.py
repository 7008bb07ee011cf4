"""What make_attention_fn's function and our layers make of a `precision`."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import hide_gpus, lower, targets

pytest.importorskip("flax")
from flax import linen as nn
from flax_layers import X, both, make

from jax_fa3.flax import make_attention_fn

B, T, N = 2, 12, 4


@pytest.mark.parametrize(
    ("precision", "heeded"),
    [
        (None, "DEFAULT"),
        ("default", "DEFAULT"),
        ("high", "HIGH"),
        ("float32", "HIGHEST"),
        (jax.lax.Precision.HIGHEST, "HIGHEST"),
        ((None, "highest"), "HIGHEST"),
        ((jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGH), "HIGH"),
    ],
)
def test_precision(monkeypatch, precision, heeded):
    """XLA's products of fp32 have it, the derivative's too; the kernels meet every one."""
    hide_gpus(monkeypatch)
    x = jax.ShapeDtypeStruct((B, T, N, 64), jnp.float32)

    def loss(q, **options):
        attention = make_attention_fn(**options)
        return attention(q, q, q, precision=precision).astype(jnp.float32).sum()

    text = lower(jax.grad(loss), x, platform="cpu")
    found = re.findall(r"precision = \[(\w+), (\w+)\]", text)
    products = text.count("stablehlo.dot_general")
    assert products > 2 and len(found) == products
    assert {name for pair in found for name in pair} <= {heeded}
    narrow = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    text = lower(jax.grad(functools.partial(loss, implementation="fa3")), narrow)
    assert targets(text) == ["jax_fa3.fwd.v1", "jax_fa3.bwd.v1"]


def test_layers_with_a_precision():
    x = jax.random.normal(jax.random.key(0), (B, T, 24))
    layer: Any = nn.MultiHeadDotProductAttention(N, precision="highest")
    ours = layer.clone(attention_fn=make_attention_fn())
    variables = layer.init(jax.random.key(1), x)
    np.testing.assert_allclose(ours.apply(variables, x), layer.apply(variables, x), atol=1e-5)


@both
@pytest.mark.parametrize("decode", [False, True])
def test_our_layers(api: str, decode: bool):
    """Their attention's products have it as their projections do."""
    options = {"precision": "highest", "decode": decode, "rotary_base": 10.0}
    text = lower(lambda x: make(api, **options)(x), X[:, :1], platform="cpu")
    assert text.count("stablehlo.dot_general") == text.count("precision = [HIGHEST, HIGHEST]") > 4
