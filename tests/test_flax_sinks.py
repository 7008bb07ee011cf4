"""The layers' parameter `sinks`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import linen as nn
from flax import nnx
from flax_layers import FEATURES, SIZES, B, K, N, T, X, both, close, make, value_and_grads
from jax.sharding import PartitionSpec as P

import jax_fa3
import jax_fa3.flax

SINKS = jnp.linspace(-2, 3, N)
OPTIONS: Any = {"use_sinks": True, "num_kv_heads": K, "rotary_base": 100.0}


def with_sinks(api: str, **options: Any) -> Any:
    layer = make(api, **OPTIONS | options)
    if api == "linen":
        assert layer.variables["params"]["sinks"].shape == (N,)
        assert not layer.variables["params"]["sinks"].any()
        layer.variables["params"]["sinks"] = SINKS
    else:
        assert layer.sinks.shape == (N,) and not layer.sinks[...].any()
        layer.sinks[...] = SINKS
    return layer


@both
def test_they_are_those_of_the_function(api):
    """As the layer passes them on; without them there is no such parameter."""

    def attend(*qkv: Any, **options: Any) -> Any:
        return jax_fa3.dot_product_attention(*qkv, **options | {"sinks": SINKS})

    found = with_sinks(api)(X)
    close(found, make(api, **OPTIONS | {"use_sinks": False, "attention_fn": attend})(X))
    assert np.abs(found - make(api, **OPTIONS)(X)).max() > 0.01


@both
def test_decoding(api):
    whole, layer = with_sinks(api)(X), with_sinks(api, decode=True)
    steps = [layer(X[:, i : i + n]) for i, n in ((0, 5), (5, 1), (6, T - 6))]
    close(jnp.concatenate(steps, axis=1), whole)


def test_linen_and_nnx_agree_and_learn_them():
    linen, layer = with_sinks("linen"), with_sinks("nnx")
    nnx.update(layer, linen.variables["params"])
    graph, state = nnx.split(layer)
    params = {"params": linen.variables["params"]}
    out, (grads,) = value_and_grads(lambda p: linen.layer.apply(p, X), params)
    other, (others,) = value_and_grads(lambda s: nnx.merge(graph, s)(X), state)
    close(out, other)
    close(grads["params"]["sinks"], others["sinks"][...])
    assert np.abs(grads["params"]["sinks"]).min() > 1e-4


def test_their_axis_is_that_of_the_heads():
    sizes: Any = SIZES | {"use_sinks": True, "kernel_axes": ("embed", "heads")}
    layer = jax_fa3.flax.linen.MultiHeadAttention(**sizes)
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    assert nn.get_partition_spec(variables)["params"]["sinks"] == P("heads")
    with nnx.use_eager_sharding(False):
        rngs = nnx.Rngs(0)
        nnx_layer = jax_fa3.flax.nnx.MultiHeadAttention(in_features=FEATURES, rngs=rngs, **sizes)
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(nnx_layer)))
    assert specs["sinks"] == P("heads")
    assert nnx_layer(jnp.ones((B, T, FEATURES))).shape == (B, T, FEATURES)
