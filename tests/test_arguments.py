"""Bad arguments: the exception, and that its text names argument, found and wanted."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import hide_gpus

import jax_fa3

B, T, S, N, K, H = 2, 16, 24, 4, 2, 64


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


GOOD: dict[str, Any] = {
    "query": zeros(B, T, N, H),
    "key": zeros(B, S, K, H),
    "value": zeros(B, S, K, H),
}
SINGLE = {name: x[0] for name, x in GOOD.items()}  # without B
FA3: dict[str, Any] = {"implementation": "fa3"}

# What no implementation can take: changes to the good arguments, and a pattern of the message.
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"query": zeros(T, H)}, "query: got shape (16, 64), wanted (B, T, N, H), or (T, N, H)"),
    ({"key": SINGLE["key"]}, "key: got shape (24, 2, 64), wanted rank 4, as query (2, 16, 4, 64)"),
    ({"key": zeros(3, S, K, H)}, "key: got shape (3, 24, 2, 64), wanted (2, S, K, 64) to go with"),
    ({"key": zeros(B, S, K, 32)}, "key: got shape (2, 24, 2, 32), wanted (2, S, K, 64) to go with"),
    ({"value": zeros(B, T, K, H)}, "value: got shape (2, 16, 2, 64), wanted (2, 24, 2, V) to go"),
    ({"value": zeros(B, S, N, H)}, "value: got shape (2, 24, 4, 64), wanted (2, 24, 2, V) to go"),
    ({"query": zeros(B, T, 3, H)}, "query: got 3 query heads, wanted a multiple of the 2 key/"),
    ({"value": zeros(B, S, K, 0)}, "query: got head dims 64, 0, wanted at least 1"),
    ({"query": zeros(B, T, N, H, dtype=jnp.int8)}, "query: got dtype int8, wanted a floating"),
    ({"key": zeros(B, S, K, H, dtype=jnp.float32)}, "key: got dtype float32, wanted bfloat16, as query has, or compute_dtype="),
    ({"value": zeros(B, S, K, H, dtype=jnp.float16)}, "value: got dtype float16, wanted bfloat16"),
    (
        {"mask": zeros(B, S, dtype=bool)},
        f"wanted one that broadcasts to (B, N, T, S) = {(B, N, T, S)}, such as mask[:, None, None]",
    ),
    ({"bias": zeros(B, T, S)}, f"(B, N, T, S) = {(B, N, T, S)}, such as bias[:, None]"),
    ({"bias": zeros(B, N, T, T)}, "bias: got shape (2, 4, 16, 16), wanted one that broadcasts to"),
    ({"bias": zeros(B, N, T, S, dtype=int)}, "bias: got dtype int32, wanted a floating dtype"),
    ({"mask": zeros(T, S)}, "mask: got dtype bfloat16, wanted bool; an additive mask is a bias"),
    ({"mask": zeros(1, B, N, T, S, dtype=bool)}, "mask: got shape (1, 2, 4, 16, 24), wanted one"),
    ({"scale": math.inf}, "scale: got inf, wanted a finite real number"),
    ({"scale": math.nan}, "scale: got nan, wanted a finite real number"),
    ({"scale": "1"}, "scale: got '1', wanted a finite real number"),
    ({"scale": 1j}, "scale: got 1j, wanted a finite real number"),
    ({"scale": [1.0]}, "scale: got [1.0], wanted a finite real number"),
    ({"scale": jnp.ones(3)}, "scale: got an array float32[3], wanted a real scalar"),
    ({"is_causal": 1}, "is_causal: got 1, wanted True or False, a static bool"),
    ({"deterministic_backward": None}, "deterministic_backward: got None, wanted True or False"),
    ({"return_residual": "no"}, "return_residual: got 'no', wanted True or False"),
    ({"query_seq_lengths": np.ones(B)}, "query_seq_lengths: got values of dtype float64, wanted"),
    ({"query_seq_lengths": [1, 2, 3]}, "query_seq_lengths: got shape (3,), wanted (2,)"),
    ({"query_seq_lengths": [True, True]}, "query_seq_lengths: got values of dtype bool, wanted"),
    ({"key_value_seq_lengths": 5}, "key_value_seq_lengths: got shape (), wanted (2,)"),
    ({"key_value_seq_lengths": [1, 2.5]}, "key_value_seq_lengths: got values of dtype float64, want"),
    ({"local_window_size": -2}, "local_window_size: got -2, wanted an int >= 0, or -1 or None"),
    ({"local_window_size": (3, -2)}, "local_window_size: got -2, wanted an int >= 0"),
    ({"local_window_size": 1.5}, "local_window_size: got 1.5, wanted a static int"),
    (
        {"local_window_size": (1, 2, 3)},
        "local_window_size: got (1, 2, 3), wanted a static int, or two, (left, right)",
    ),
    ({"query_offset": 0.5}, "query_offset: got 0.5, wanted a static int"),
    ({"query_offset": True}, "query_offset: got True, wanted a static int"),
    ({"query_offset": [1, 2, 3]}, "query_offset: got shape (3,), wanted (2,)"),
    ({"query_offset": jnp.float32(1)}, "query_offset: got values of dtype float32, wanted integers"),
    (
        {"query_segment_ids": zeros(B, T, dtype=int)},
        "key_value_segment_ids: got None, wanted both query_segment_ids and key_value_segment_ids",
    ),
    (
        {"key_value_segment_ids": zeros(B, S, dtype=int)},
        "query_segment_ids: got None, wanted both query_segment_ids and key_value_segment_ids",
    ),
    (
        {"query_segment_ids": zeros(B, S), "key_value_segment_ids": zeros(B, S)},
        "query_segment_ids: got values of dtype bfloat16, wanted integers",
    ),
    (
        {
            "query_segment_ids": zeros(B, T, dtype=int),
            "key_value_segment_ids": zeros(B, T, dtype=int),
        },
        "key_value_segment_ids: got shape (2, 16), wanted (2, 24)",
    ),
    ({"key_begin": zeros(T, dtype=int)}, "key_begin: got shape (16,), wanted (2, 16)"),
    ({"key_end": zeros(B, S, dtype=int)}, "key_end: got shape (2, 24), wanted (2, 16)"),
    ({"key_end": zeros(B, T)}, "key_end: got values of dtype bfloat16, wanted integers"),
    ({"logits_soft_cap": -1}, "logits_soft_cap: got -1, wanted a static float > 0, or 0 or None"),
    ({"scale": jnp.float32(math.nan)}, "scale: got Array(nan, dtype=float32), wanted a finite real"),
    ({"logits_soft_cap": math.inf}, "logits_soft_cap: got inf, wanted a finite real number"),
    ({"logits_soft_cap": jnp.float32(1)}, "wanted a static float > 0"),
    ({"implementation": "cudnn"}, "implementation: got 'cudnn', wanted 'fa3', its equal here"),
    ({"implementation": ("fa3", "cudnn")}, "implementation: got 'cudnn', wanted 'fa3', its equal"),
    ({"implementation": ["triton"]}, "implementation: got 'triton', wanted None, 'fa3' or 'xla', or"),
    ({"implementation": ()}, "implementation: got (), wanted None, 'fa3' or 'xla', or a sequence"),
    ({"compute_dtype": int}, "compute_dtype: got <class 'int'>, wanted a floating dtype such as"),
    ({"checkpoint_name": 3}, "checkpoint_name: got 3, wanted a string, or two: of out and the"),
    ({"checkpoint_name": ["a"]}, "checkpoint_name: got ['a'], wanted a string, or two"),
    ({**SINGLE, "query_seq_lengths": [1, 2]}, "query_seq_lengths: got shape (2,), wanted () or (1,)"),
    ({**SINGLE, "key_begin": [1, 2]}, "key_begin: got shape (2,), wanted (16,) or (1, 16)"),
]  # fmt: skip

# What only the kernels cannot take.
UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"bias": zeros(S), "logits_soft_cap": 2.0}, "logits_soft_cap: got one beside a bias, wanted one"),
    (
        {name: x.astype(jnp.float32) for name, x in GOOD.items()},
        "query: got dtype float32, wanted bfloat16 or float16: cast it, as compute_dtype=jnp.bfloat16",
    ),
    ({"scale": 0}, "scale: got 0.0, wanted a positive float32: multiply query instead"),
    ({"scale": -1.0}, "scale: got -1.0, wanted a positive float32"),
    ({"scale": 1e-60}, "scale: got 1e-60, wanted a positive float32"),
    ({"scale": 1e60}, "scale: got 1e+60, wanted a positive float32"),
    ({"scale": jnp.float32(-1)}, "scale: got -1.0, wanted a positive float32: multiply query instead"),
    ({"logits_soft_cap": 1e-60}, "logits_soft_cap: got 1e-60, wanted a positive float32"),
    (
        {"query": zeros(B, T, N, 60), "key": zeros(B, S, K, 60)},
        "query: got head dim 60, wanted a multiple of 8: pad it with zeros",
    ),
    (
        {"value": zeros(B, S, K, 520)},
        "value: got head dims (64, 520) in bfloat16, wanted at most one of those built: [(64, 64)",
    ),
    (
        {"query": zeros(B, T, N, 584), "key": zeros(B, S, K, 584)},
        "query: got head dims (584, 64) in bfloat16, wanted at most one of those built: [(64, 64)",
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    hide_gpus(monkeypatch)


@pytest.mark.parametrize(("changes", "message"), INVALID)
@pytest.mark.parametrize("implementation", [None, "xla", "fa3"])
def test_invalid(changes, message, implementation):
    arguments = {"implementation": implementation, **GOOD, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        jax_fa3.dot_product_attention(**arguments)


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED)
def test_unsupported(changes, message):
    with pytest.raises(NotImplementedError, match=re.escape(message)) as error:
        jax_fa3.dot_product_attention(**GOOD | changes | FA3)
    assert str(error.value).endswith("or use implementation='xla'")
    out = jax_fa3.dot_product_attention(**GOOD | changes)
    assert out.shape[:3] == (B, T, N)


@pytest.mark.parametrize(
    ("shape", "num_kv_heads", "message"),
    [
        ((B, T, N, H), None, "qkv: got shape (2, 16, 4, 64), wanted (B, T, 3, N, H), or (T, 3, N"),
        ((B, T, 2, N, H), None, "qkv: got shape (2, 16, 2, 4, 64), wanted (B, T, 3, N, H)"),
        ((B, T, 3, N, H), 4, "qkv: got 4 heads, wanted at least 2 * num_kv_heads = 8"),
        ((B, T, N, H), 3, "qkv: got 4 heads, wanted at least 2 * num_kv_heads = 6"),
        ((B, T, 5, H), 1.0, "num_kv_heads: got 1.0, wanted a static int"),
        ((B, T, 5, H), -1, "num_kv_heads: got -1, wanted an int >= 0"),
        ((B, T, 7, H), 2, "qkv: got 3 query heads, wanted a multiple of the 2 key/value heads"),
    ],
)
def test_invalid_packed(shape, num_kv_heads, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax_fa3.qkv_dot_product_attention(zeros(*shape), num_kv_heads)


def test_invalid_packed_dtype():
    with pytest.raises(ValueError, match="qkv: got dtype int32, wanted a floating dtype"):
        jax_fa3.qkv_dot_product_attention(zeros(B, T, 3, N, H, dtype=int))


def test_unknown_options():
    options: Any = {"sliding_window": 3}
    with pytest.raises(TypeError, match="sliding_window"):
        jax_fa3.qkv_dot_product_attention(zeros(B, T, 3, N, H), **options)
    with pytest.raises(TypeError, match="sliding_window"):
        jax_fa3.is_supported(**GOOD, **options)


def test_invalid_under_jit():
    """The errors come at trace time, from tracers too."""
    with pytest.raises(ValueError, match="key_end: got shape"):
        jax.eval_shape(
            lambda x: jax_fa3.dot_product_attention(**GOOD, key_end=x), zeros(3, dtype=int)
        )
    with pytest.raises(ValueError, match="logits_soft_cap: got .*wanted a static float > 0"):
        jax.eval_shape(lambda x: jax_fa3.dot_product_attention(**GOOD, logits_soft_cap=x), 1.0)
    with pytest.raises(NotImplementedError, match="scale: got a traced value"):
        jax.eval_shape(lambda x: jax_fa3.dot_product_attention(**GOOD | FA3, scale=x), 1.0)
