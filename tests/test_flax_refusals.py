"""What make_attention_fn and the layers of jax_fa3.flax refuse, each with a message."""

from typing import Any

import jax.numpy as jnp
import pytest
from helpers import Results, assert_same

pytest.importorskip("flax")
from flax_layers import (
    CAUSAL,
    IDS,
    B,
    H,
    N,
    T,
    X,
    both,
    make,
)

from jax_fa3.flax import make_attention_fn

FA3 = {"implementation": "fa3"}
FUNCTION: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "dropout": (
        {},
        {"dropout_rate": 0.1},
        ValueError,
        r"^dropout_key: got None, wanted a key of jax.random",
    ),
    "precision": (
        {},
        {"precision": "greatest"},
        ValueError,
        "^precision: got 'greatest', wanted None, a jax.lax.Precision or",
    ),
    "einsum": (
        {},
        {"qk_attn_weights_einsum": jnp.einsum},
        NotImplementedError,
        "^qk_attn_weights_einsum: got .*, wanted None",
    ),
    "einsum of the values": (
        {},
        {"attn_weights_value_einsum": jnp.einsum},
        NotImplementedError,
        "^attn_weights_value_einsum: got .*, wanted None",
    ),
    "positions": (
        {},
        {"input_positions": 3},
        NotImplementedError,
        "^input_positions: got 3, wanted None: jax_fa3.flax.nnx.MultiHeadAttention",
    ),
    "float32": (FA3, {}, NotImplementedError, "got dtype float32, .* compute_dtype=jnp.bfloat16"),
    "mask per head": (
        {"mask_to_intervals": True},
        {"mask": jnp.ones((B, N, T, T))},
        ValueError,
        "^mask: got shape .*, wanted .* one mask for all heads",
    ),
}


@pytest.mark.parametrize("name", FUNCTION)
def test_function_refuses(name):
    options, arguments, error, match = FUNCTION[name]
    q = jnp.ones((B, T, N, H))
    with pytest.raises(error, match=match):
        make_attention_fn(**options)(q, q, q, **arguments)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"local_window_size": 3}])
def test_refuses_to_guess_the_alignment(options):
    """A layer that decodes passes one query and all keys: aligned at the top it would see key 0."""
    q, k = jnp.ones((B, 1, N, H)), jnp.ones((B, T, N, H))
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: got 1 queries and 12 keys"):
        make_attention_fn(**options)(q, k, k)
    aligned = make_attention_fn(**options, query_offset=T - 1)(q, k, k)
    assert_same(Results(aligned, None), Results(jnp.ones_like(q), None), rtol=1e-5)  # type: ignore


def test_refuses_at_once():
    with pytest.raises(TypeError, match="^make_attention_fn: got causal, wanted options of"):
        make_attention_fn(causal=True)  # type: ignore[call-arg]
    with pytest.raises(
        ValueError, match="^mask_to_intervals: got True beside key_begin or key_end"
    ):
        make_attention_fn(mask_to_intervals=True, key_begin=[0])


LAYER: dict[str, tuple[Any, Any, str]] = {
    "features per head": (
        {"qkv_features": 30},
        {},
        "^qkv_features: got 30, wanted a multiple of num_heads = 4",
    ),
    "heads": ({"num_kv_heads": 3}, {}, "^num_kv_heads: got 3, wanted a divisor of num_heads = 4"),
    "no heads": ({"num_kv_heads": 0}, {}, "^num_kv_heads: got 0, wanted a divisor"),
    "odd": (
        {"qkv_features": 20, "rotary_base": 10.0},
        {},
        "^rotary_base: got head dim 5, wanted an even",
    ),
    "base": ({"rotary_base": -1.0}, {}, "^rotary_base: got -1.0, wanted a float > 0"),
    "positions": (
        {},
        {"positions": jnp.arange(T)},
        "^positions: got an array, wanted None, as the",
    ),
    "positions of another shape": (
        {"rotary_base": 10.0},
        {"positions": jnp.arange(T - 1)},
        r"^positions: got shape \(11,\), wanted \(12,\) or \(2, 12\)",
    ),
    "rotary across": (
        {"rotary_base": 10.0},
        {"inputs_k": X[:, :3]},
        "^inputs_k: got 12 queries and 3 keys, wanted as many of both",
    ),
    "values alone": (
        {},
        {"inputs_v": X},
        "^inputs_k: got None, wanted an array where inputs_v is one",
    ),
    "rank": ({}, {"inputs_q": X[None]}, r"^inputs_q: got shape .*, wanted \(B, T, features\)"),
    "segments of one side": ({}, {"query_segment_ids": IDS}, "^key_value_segment_ids: got None"),
}


@both
@pytest.mark.parametrize("name", LAYER)
def test_layer_refuses(api, name):
    options, arguments, match = LAYER[name]
    with pytest.raises(ValueError, match=match):
        make(api, **options)(**{"inputs_q": X} | arguments)


@both
def test_refuses_unknown_arguments(api):
    layer = make(api)
    with pytest.raises(
        TypeError, match=r"^mask: .* wanted key_begin and key_end: .*mask_to_intervals\(mask\)"
    ):
        layer(X, mask=CAUSAL)
    with pytest.raises(
        TypeError, match="^segment_ids: not an argument of this layer, wanted one of"
    ):
        layer(X, segment_ids=IDS)


def test_nnx_refuses_other_features():
    layer = make("nnx", in_kv_features=7)
    narrow = X[..., :-1]
    with pytest.raises(ValueError, match="^inputs_q: got 23 features, wanted in_features = 24"):
        layer(narrow, X)
    with pytest.raises(ValueError, match="^inputs_k: got 24 features, wanted in_kv_features = 7"):
        layer(X, X)
