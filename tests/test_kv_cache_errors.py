"""Calls of jax_fa3.kv_cache that mean nothing: at trace time, naming the argument, found and wanted."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_ffi import needs_kernels

from jax_fa3 import kv_cache

B, T, N, K, H, PAGE, PAGES = 2, 3, 4, 2, 16, 8, 10


def zeros(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jnp.zeros(shape, dtype)


CACHE, QUERY, NEW = zeros(PAGES, PAGE, K, H), zeros(B, T, N, H), zeros(B, T, K, H)
TABLE, LENGTHS = np.zeros((B, 4), int), np.array([5, 9])
CACHES = {"key_cache": CACHE, "value_cache": CACHE}
WHERE: dict[str, Any] = {**CACHES, "key_value_seq_lengths": LENGTHS, "page_table": TABLE}
ATTEND: dict[str, Any] = {"query": QUERY, **WHERE}
APPEND: dict[str, Any] = {"key": NEW, "value": NEW, **WHERE}
RAGGED: dict[str, Any] = {"query": zeros(6, N, H), "query_starts": [0, 2, 6]}
ONE = {"value_cache": None}

# What is changed, and the message.
OF_CACHES: list[tuple[dict[str, Any], str]] = [
    ({"key_cache": zeros(PAGES, K, H)}, r"key_cache: got shape \(10, 2, 16\), wanted \(pages, page size, K, H\) with H = 16"),
    ({"key_cache": zeros(PAGES, PAGE, K, 24)}, r"key_cache: got shape .*, wanted .* with H = 16, as (query|key) has"),
    ({"key_cache": zeros(PAGES, 0, K, H), "value_cache": zeros(PAGES, 0, K, H)}, "key_cache: got shape .*, wanted pages, or rows, of at least 1 position"),
    ({"key_cache": CACHE.astype(jnp.float32)}, "key_cache: got dtype float32, wanted bfloat16, as (query|key) has, or float8_e4m3fn"),
    ({"key_cache": CACHE.astype(jnp.float8_e5m2)}, "key_cache: got dtype float8_e5m2, wanted bfloat16"),
    ({"key_cache": None}, "key_cache: got None, wanted an array of numbers"),
    ({"value_cache": None}, "value_cache: got None, wanted an array, as kv_layout is 'NHD'"),
    ({"value_cache": zeros(PAGES, PAGE, 3, H)}, r"value_cache: got shape .*, wanted \(10, 8, 2, 'V'\) to go with key_cache"),
    ({"value_cache": CACHE.astype(jnp.float8_e4m3fn)}, "value_cache: got dtype float8_e4m3fn, wanted bfloat16, as key_cache has"),
    ({"kv_layout": "NDH"}, "kv_layout: got 'NDH', wanted 'NHD' or 'HND' or 'interleaved' or 'lanes'"),
    ({"kv_layout": None}, "kv_layout: got None, wanted 'NHD'"),
    ({"kv_layout": "lanes"}, "value_cache: got an array, wanted None, for key_cache holds both, as kv_layout is 'lanes'"),
    ({"kv_layout": "lanes", **ONE}, r"key_cache: got shape .*, wanted \(pages, page size, K, H \+ V\) with H = 16"),
    ({"kv_layout": "interleaved", **ONE, "key_cache": zeros(PAGES, PAGE, 3, H)}, r"key_cache: got shape .*, wanted \(pages, page size, 2K, H\)"),
    ({"key_value_seq_lengths": None}, "key_value_seq_lengths: got None, wanted an array of numbers"),
    ({"key_value_seq_lengths": [1, 2, 3]}, r"key_value_seq_lengths: got shape \(3,\), wanted \(2,\)"),
    ({"key_value_seq_lengths": [1.0, 2.0]}, "key_value_seq_lengths: got values of dtype float.*, wanted integers"),
    ({"page_table": TABLE[:1]}, r"page_table: got shape \(1, 4\), wanted \(2, 4\)"),
    ({"page_table": TABLE[0]}, r"page_table: got shape \(4,\), wanted \(2, 1\)"),
    ({"page_table": TABLE[:, :0]}, r"page_table: got shape \(2, 0\), wanted at least one page"),
    ({"page_table": TABLE + 0.5}, "page_table: got values of dtype float64, wanted integers"),
    ({"page_table": None}, r"cache_rows: got None for 2 sequences and a key_cache of shape \(10, 8, 2, 16\), wanted int32 \[B\].*page_table="),
    ({"cache_rows": [0, 1]}, "cache_rows: got an array, wanted None, as page_table is given"),
    ({"page_table": None, "cache_rows": [0]}, r"cache_rows: got shape \(1,\), wanted \(2,\)"),
    ({"num_sequences": [1, 2]}, r"num_sequences: got shape \(2,\), wanted \(\)"),
    ({"query_starts": [0, 3, 6]}, "query_starts: got an array, wanted None, as (query|key) has a batch axis"),
    ({"implementation": "cudnn"}, "implementation: got 'cudnn', wanted 'fa3', its equal here"),
    ({"sharding": "data"}, "sharding: got 'data', wanted a jax.sharding.NamedSharding or PartitionSpec"),
    ({"sharding": P("data")}, "sharding: got .*, wanted a NamedSharding, for there is no jax.set_mesh here"),
    ({"key_scale": np.ones(3)}, r"key_scale: got shape \(3,\), wanted a scalar, \[K\], \[B, K\], or one per token"),
    ({"value_scale": np.ones((PAGES, 1, K))}, r"value_scale: got shape .* or \(10, 8, 2\)"),
    ({"value_scale": "1"}, "value_scale: got '1', wanted an array of numbers"),
    ({"value_scale": True}, "value_scale: got dtype bool, wanted real numbers"),
]  # fmt: skip
OF_ATTENTION: list[tuple[dict[str, Any], str]] = [
    ({"query": zeros(N, H)}, r"query: got shape \(4, 16\), wanted \(B, T, N, H\), or ragged \(rows, N, H\)"),
    ({"query": zeros(B, T, N, H, dtype=int)}, "query: got dtype int32, wanted a floating dtype"),
    ({"query": QUERY.astype(jnp.float8_e4m3fn)}, "query: got dtype float8_e4m3fn, wanted a floating dtype of 16 bits or more"),
    ({"query": zeros(B, T, 5, H)}, "query: got 5 heads, wanted a multiple of the 2 key/value heads"),
    ({"query": zeros(B, 33, N, H)}, "query: got 33 rows, wanted at most 32, the positions that the cache has"),
    ({**RAGGED, "query_starts": None}, r"query_starts: got None, wanted int32 \[B \+ 1\], as query is ragged"),
    ({**RAGGED, "query_starts": [0, 6]}, r"query_starts: got shape \(2,\), wanted \(3,\)"),
    ({**RAGGED, "key_value_seq_lengths": 3}, r"key_value_seq_lengths: got shape \(\), wanted \(B,\)"),
    ({**RAGGED, "key_begin": np.zeros(5, int)}, r"key_begin: got shape \(5,\), wanted \(2,\) or \(6,\)"),
    ({"key_begin": np.zeros((B, T)) }, "key_begin: got values of dtype float64, wanted integers"),
    ({"key_end": [3, 4]}, r"key_end: got shape \(2,\), wanted \(2, 3\)"),
    ({"sinks": np.ones(3, np.float32)}, r"sinks: got shape \(3,\), wanted \(4,\), one for each query head"),
    ({"sinks": [1, 2, 3, 4]}, "sinks: got dtype int.*, wanted a floating dtype"),
    ({"is_causal": 1}, "is_causal: got 1, wanted True or False"),
    ({"local_window_size": (3, -2)}, "local_window_size: got -2, wanted an int >= 0"),
    ({"logits_soft_cap": -0.5}, "logits_soft_cap: got -0.5, wanted a static float > 0"),
    ({"scale": "1"}, "scale: got '1', wanted a finite real number"),
    ({"split_size": 0}, "split_size: got 0, wanted an int > 0, or None"),
    ({"split_size": 2.5}, "split_size: got 2.5, wanted a static int"),
    ({"return_residual": None}, "return_residual: got None, wanted True or False"),
]  # fmt: skip
ANGLES = {"rotary_cos": np.ones((40, 4)), "rotary_sin": np.ones((40, 4))}
OF_APPEND: list[tuple[dict[str, Any], str]] = [
    ({"key": zeros(K, H)}, r"key: got shape \(2, 16\), wanted \(B, T, K, H\), or ragged \(rows, K, H\)"),
    ({"key": zeros(B, T, 3, H)}, "key: got 3 heads, wanted the 2 that the cache has"),
    ({"key": zeros(B, 33, K, H)}, "key: got 33 rows, wanted at most 32"),
    ({"value": zeros(B, T, K, 24)}, r"value: got shape .*, wanted \(2, 3, 2, 16\), to go with key and the cache"),
    ({"value": NEW.astype(jnp.float32)}, "value: got dtype float32, wanted bfloat16, as key has"),
    ({"query": QUERY}, "query: got an array, wanted None, as there are no rotary_cos and rotary_sin"),
    ({"positions": np.zeros((B, T), int)}, "positions: got an array, wanted None, as there are no"),
    ({"rotary_cos": ANGLES["rotary_cos"]}, "rotary_sin: got None, wanted both rotary_cos and rotary_sin"),
    ({"rotary_cos": np.ones((40, 9)), "rotary_sin": np.ones((40, 9))}, r"rotary_cos: got shape \(40, 9\), wanted \(positions, at most 8\)"),
    ({"rotary_cos": np.ones(4), "rotary_sin": np.ones(4)}, r"rotary_cos: got shape \(4,\)"),
    ({**ANGLES, "rotary_sin": np.ones((40, 3))}, r"rotary_sin: got shape \(40, 3\), wanted \(40, 4\)"),
    ({**ANGLES, "rotary_cos": np.ones((40, 4), int)}, "rotary_cos: got dtype int.*, wanted a floating dtype"),
    ({**ANGLES, "query": zeros(B, T, N, 24)}, r"query: got shape .*, wanted the rows and the head dim of key, \(2, 3, 2, 16\)"),
    ({**ANGLES, "query": zeros(B, T, 3, H)}, "query: got 3 heads, wanted a multiple of the 2 key/value heads"),
    ({**ANGLES, "positions": [0, 1]}, r"positions: got shape \(2,\), wanted \(2, 3\)"),
    ({"rotary_interleaved": None}, "rotary_interleaved: got None, wanted True or False"),
    ({**ANGLES, **{name: x.astype(jnp.float8_e4m3fn) for name, x in {"key": NEW, "value": NEW, **CACHES}.items()}}, "key: got dtype float8_e4m3fn, wanted 16 bits or more, to be rotated"),
]  # fmt: skip


def refused(function: Callable[..., Any], good: Any, wrong: Any, message: str) -> None:
    """At trace time: arrays are tracers, the rest is static."""
    arguments = {**good, **wrong}
    arrays = {name: x for name, x in arguments.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in arguments.items() if name not in arrays}
    with pytest.raises(ValueError, match=f"^{message}"):
        jax.eval_shape(functools.partial(function, **static), **arrays)


@pytest.mark.parametrize("wrong, message", [*OF_CACHES, *OF_ATTENTION])
def test_attention(wrong: Any, message: str):
    refused(kv_cache.dot_product_attention, ATTEND, wrong, message)


@pytest.mark.parametrize("wrong, message", [*OF_CACHES, *OF_APPEND])
def test_append(wrong: Any, message: str):
    refused(kv_cache.append, APPEND, wrong, message)


def test_good_calls_are_not_refused():
    """But for the change there is nothing wrong with them."""
    for function, good in (
        (kv_cache.dot_product_attention, ATTEND),
        (kv_cache.dot_product_attention, {**ATTEND, **RAGGED}),
        (kv_cache.append, APPEND),
        (kv_cache.append, {**APPEND, **ANGLES, "query": QUERY}),
    ):
        jax.eval_shape(functools.partial(function, **good))


def test_append_and_attend():
    both = {**ATTEND, **APPEND}
    refused(kv_cache.append_and_attend, both, {"split_size": 0}, "split_size: got 0")
    refused(kv_cache.append_and_attend, both, {"value": NEW[..., :3]}, "value: got shape")
    with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
        kv_cache.append_and_attend(**both, windows=3)


FLOATS = {name: APPEND[name].astype(jnp.float32) for name in ("key", "value", *CACHES)}
NOT_APPENDED: list[tuple[dict[str, Any], str]] = [
    ({**FLOATS, **ANGLES}, "key: got dtype float32 for a cache of float32, to be rotated, wanted bfloat16 or float16"),
    ({**FLOATS, **{name: APPEND[name].astype(jnp.float8_e4m3fn) for name in CACHES}}, "key: got dtype float32 for a cache of float8_e4m3fn, wanted bfloat16 or float16"),
    ({"key_scale": 2.0}, "key_scale: got an array, wanted None, as the cache is not float8_e4m3fn"),
    ({"value_scale": 2.0}, "value_scale: got an array, wanted None, as"),
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize(("changed", "message"), NOT_APPENDED)
def test_what_the_kernel_does_not_append(changed: dict[str, Any], message: str):
    with pytest.raises(NotImplementedError, match=f"^implementation='fa3': {message}.* use implementation='xla'"):  # fmt: skip
        kv_cache.append(**(APPEND | changed), implementation="fa3")


ROWS = np.zeros((B, T), int)
ODD = zeros(PAGES, 12, K, H)
IN_E4M3 = {name: ATTEND[name].astype(jnp.float8_e4m3fn) for name in CACHES}
NOT_IN_THE_KERNEL: list[tuple[dict[str, Any], str]] = [
    ({name: ATTEND[name].astype(jnp.float32) for name in ("query", *CACHES)}, "query: got dtype float32, wanted bfloat16 or float16"),
    ({"query": QUERY.astype(jnp.float16), **IN_E4M3, "value_scale": zeros(PAGES, PAGE, K)}, "value_scale: got one for each token, wanted at most one for each sequence and head with float16"),
    ({"key_scale": 2.0}, "key_scale: got an array, wanted None, as the cache is not float8_e4m3fn"),
    ({"value_scale": [1.0, 2.0]}, "value_scale: got an array, wanted None, as"),
    ({"key_end": ROWS}, "key_end: got an array, wanted None"),
    ({"key_begin": ROWS}, r"key_begin: got shape \(2, 3\), wanted \(2,\)"),
    ({"split_size": 64}, "split_size: got 64, wanted a multiple of 128, for at most 64 splits"),
    ({"split_size": 128, "page_table": np.zeros((B, 2000), int)}, "split_size: got 128, wanted a multiple of 128, for at most 64"),
    ({"scale": -1.0}, "scale: got -1.0, wanted a positive float32"),
    ({"logits_soft_cap": 1e-300}, "logits_soft_cap: got 1e-300, wanted a positive float32"),
]  # fmt: skip
BY_SIZE: list[tuple[dict[str, Any], str]] = [
    ({"key_cache": ODD, "value_cache": ODD}, "key_cache: got pages of 12, wanted a multiple of 8"),
    ({"query": QUERY[..., :12], **{name: CACHE[..., :12] for name in CACHES}}, r"query: got head dim 12 in a cache \(10, 8, 2, 12\), wanted multiples of 8"),
    ({"query": QUERY[..., :8], **{name: x[..., :8] for name, x in IN_E4M3.items()}}, r"query: got head dim 8 in a cache \(10, 8, 2, 8\), wanted multiples of 16"),
    ({"query": zeros(B, T, N, 264), **dict.fromkeys(CACHES, zeros(PAGES, PAGE, K, 264))}, "query: got head dims \\(264, 264\\) in bfloat16, wanted at most one of those built"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), NOT_IN_THE_KERNEL)
def test_what_the_kernel_does_not_take(changed: dict[str, Any], message: str):
    with pytest.raises(NotImplementedError, match=f"^implementation='fa3': {message}.* use implementation='xla'"):  # fmt: skip
        kv_cache.dot_product_attention(**(ATTEND | changed), implementation="fa3")


@needs_kernels
@pytest.mark.parametrize(("changed", "message"), BY_SIZE)
def test_sizes_that_the_kernel_does_not_take(changed: dict[str, Any], message: str):
    with pytest.raises(NotImplementedError, match=f"^implementation='fa3': {message}.* use implementation='xla'"):  # fmt: skip
        kv_cache.dot_product_attention(**(ATTEND | changed), implementation="fa3")
