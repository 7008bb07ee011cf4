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


def test_bf16():
    weights, function = with_weights(ours, is_causal=True)
    arrays = weights, *inputs(SHAPES, jnp.float32)
    arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
    assert_no_further(function, with_weights(theirs, mask=CAUSAL)[1], arrays)


def test_a_batch_of_a_float32_layer_is_one_kernel():
    call = partial(adapter.multihead_attention, layer(), is_causal=True, compute_dtype=jnp.bfloat16)
    batch = inputs([(3, *shape) for shape in SHAPES], jnp.float32)
    assert_runs_kernels(jax.vmap(call), batch)
    exact = jax.vmap(partial(layer(), mask=CAUSAL))(*batch)
    np.testing.assert_allclose(jax.vmap(call)(*batch), exact, atol=0.02)


def test_dropout_is_refused_unless_it_is_off():
    found = inputs(SHAPES, jnp.float32)
    with pytest.raises(
        NotImplementedError, match="dropout_p: got 0.1, wanted 0, or inference=True"
    ):
        ours(layer(dropout_p=0.1), *found, key=jax.random.key(0))
    off = ours(layer(dropout_p=0.1), *found, inference=True)
    np.testing.assert_allclose(off, layer()(*found), atol=1e-5)
