"""jax_fa3.integrations.equinox.multihead_attention, against the layer itself."""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integrations import (
    assert_no_further,
    assert_runs_kernels,
    assert_same_as_theirs,
    inputs,
    project,
)

eqx = project("equinox", "equinox")
adapter: Any = importlib.import_module("jax_fa3.integrations.equinox")
pytestmark = pytest.mark.usefixtures("on_cpu")
T, S = 24, 20
SHAPES = (T, 32), (S, 16), (S, 16)
CAUSAL = jnp.tri(T, S, dtype=bool)


def layer(**options: Any) -> Any:
    sizes = {"num_heads": 4, "query_size": 32, "key_size": 16, "value_size": 16, "vo_size": 16}
    biases = {"use_query_bias": True, "use_output_bias": True}
    return eqx.nn.MultiheadAttention(**sizes, **biases, **options, key=jax.random.key(1))


def swapped(query: Any, key: Any, value: Any) -> Any:
    return query + 1, 2 * key, value


def ours(layer: Any, *arrays: Any, **options: Any) -> Any:
    return adapter.multihead_attention(layer, *arrays, **options)


def theirs(layer: Any, *arrays: Any, **options: Any) -> Any:
    return layer(*arrays, **options)


def with_weights(function: Any, **options: Any) -> Any:
    """Of the layer's weights too."""
    weights, static = eqx.partition(layer(), eqx.is_inexact_array)
    return weights, lambda w, *arrays: function(eqx.combine(w, static), *arrays, **options)


CASES = {
    "full": ({}, {}),
    "causal": ({"is_causal": True}, {"mask": CAUSAL}),
    "window": (
        {"is_causal": True, "local_window_size": 11, "key_value_seq_lengths": 18},
        {"mask": CAUSAL & ~jnp.tri(T, S, -12, dtype=bool) & (jnp.arange(S) < 18)},
    ),
    "process_heads": ({"process_heads": swapped, "is_causal": True},) * 2,
    "a mask by head": ({"mask": jnp.stack([CAUSAL, ~CAUSAL | (jnp.arange(S) < 1)] * 2)},) * 2,
}
CASES["process_heads"] = CASES["process_heads"][0], {"process_heads": swapped, "mask": CAUSAL}


@pytest.mark.parametrize("name", CASES)
def test_same_as_the_layer(name):
    mine, other = CASES[name]
    weights, function = with_weights(ours, **mine)
    arrays = weights, *inputs(SHAPES, jnp.float32)
    assert_same_as_theirs(function, with_weights(theirs, **other)[1], arrays)


@pytest.mark.parametrize("name", CASES)
def test_bf16(name):
    mine, other = CASES[name]
    weights, function = with_weights(ours, **mine)
    arrays = weights, *inputs(SHAPES, jnp.float32)
    arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
    pooled = name == "a mask by head"  # of a query bias of 32 numbers
    assert_no_further(function, with_weights(theirs, **other)[1], arrays, pooled=pooled)


def test_a_batch_of_a_float32_layer_is_one_kernel():
    call = partial(adapter.multihead_attention, layer(), is_causal=True, compute_dtype=jnp.bfloat16)
    batch = inputs([(3, *shape) for shape in SHAPES], jnp.float32)
    assert_runs_kernels(jax.vmap(call), batch)
    exact = jax.vmap(partial(layer(), mask=CAUSAL))(*batch)
    np.testing.assert_allclose(jax.vmap(call)(*batch), exact, atol=0.02)


def test_dropout():
    found, dropping = inputs(SHAPES, jnp.float32), layer(dropout_p=0.25)
    off = ours(dropping, *found, inference=True)
    np.testing.assert_allclose(off, layer()(*found), atol=1e-5)
    with pytest.raises(ValueError, match="key: got None, wanted one for dropout of 0.25, or"):
        ours(dropping, *found)
    keys = jax.random.split(jax.random.key(0), 4000)
    outs = jax.vmap(lambda key: ours(dropping, *found, key=key))(keys)
    assert np.abs(outs[0] - outs[1]).max() > 0.1
    np.testing.assert_allclose(outs.mean(0), off, atol=6 * outs.std(0).max() / np.sqrt(len(keys)))
    expected = jax.vmap(lambda key: theirs(dropping, *found, key=key))(keys)
    np.testing.assert_allclose(outs.std(0), expected.std(0), rtol=0.15)


@pytest.mark.parametrize("name", ["full", "window", "a mask by head"])
def test_reaches_the_kernels(name):
    call = partial(ours, layer(), compute_dtype=jnp.bfloat16, **CASES[name][0])
    assert_runs_kernels(call, inputs(SHAPES, jnp.float32))
