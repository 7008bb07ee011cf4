"""The public functions as a user calls them, on a machine without a GPU, and what they lower to."""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference
from lowering import lower, operations, targets

import jax_fa3

B, T, S, N, K, H, V = 2, 10, 14, 4, 2, 32, 16
FWD, SEGMENTS = "jax_fa3.fwd.v1", "jax_fa3.segment_intervals.v1"
IDS = np.repeat([0, 1, 2], (3, 4, 3))
# Every mask argument, with and without B.
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True, "query_offset": 4},
    "window": {"local_window_size": (3, 2), "query_offset": [4, -2]},
    "lengths": {"query_seq_lengths": [3, 10], "key_value_seq_lengths": [14, 5]},
    "intervals": {"key_begin": np.full((B, T), 2), "key_end": np.full((B, T), 9)},
    "segments": {
        "query_segment_ids": np.stack([IDS, IDS[::-1]]),
        "key_value_segment_ids": np.stack([np.repeat([2, 0, 1, -1], (5, 4, 3, 2)), [0] * S]),
    },
    "the rest": {"logits_soft_cap": 1.5, "scale": 0.5, "deterministic_backward": True},
}


pytestmark = pytest.mark.usefixtures("on_cpu")


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


QKV = normal(B, T, N, H), normal(B, S, K, H, seed=1), normal(B, S, K, V, seed=2)


def structs(*shapes: Any, dtype: Any = jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def attention(*qkv: Any, **options: Any) -> Any:
    return jax_fa3.dot_product_attention(*qkv, **{"return_residual": True} | options)


def expected(*qkv: jax.Array, **options: Any) -> Any:
    options.pop("deterministic_backward", None)
    return reference(*(x.astype(jnp.float32) for x in qkv), **options)


def assert_close(found: Any, exact: Any, tolerance: float = 5e-3) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("name", MASKS)
def test_numbers(name, implementation):
    out, lse = attention(*QKV, **MASKS[name], implementation=implementation)
    assert (out.dtype, lse.dtype) == (jnp.float16, jnp.float32)
    assert_close((out, lse), expected(*QKV, **MASKS[name]))
    alone = attention(*QKV, **MASKS[name], implementation=implementation, return_residual=False)
    assert_close(alone, out)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("name", MASKS)
def test_without_batch_axis(name, implementation):
    """Each batch entry alone, its arguments without B and with a leading 1."""
    exact = expected(*QKV, **MASKS[name])
    for i in range(B):
        whole = MASKS[name]
        per_entry = {k for k, x in whole.items() if np.ndim(x) and k != "local_window_size"}
        entry = {k: whole[k][i] for k in per_entry}
        leading = {k: np.asarray(x)[None] for k, x in entry.items()}
        for arguments in (entry, leading):
            options = whole | arguments | {"implementation": implementation}
            found = attention(*(x[i] for x in QKV), **options)
            assert found[0].shape == (T, N, V) and found[1].shape == (T, N)
            assert_close(found, jax.tree.map(lambda x, i=i: x[i], exact))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_agrees_with_jax_nn(dtype):
    qkv = [normal(B, T, heads, H, seed=heads, dtype=dtype) for heads in (N, K, K)]
    bias, mask = (
        normal(1, N, T, 1, dtype=dtype),
        jnp.ones((B, 1, 1, T), bool).at[:, :, :, 3].set(False),
    )
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {"is_causal": True, "local_window_size": 4, "scale": 0.3}),
        ((), {"key_value_seq_lengths": jnp.array([3, 8], jnp.int32)}),
        ((bias, mask), {"implementation": "xla"}),
        ((bias, mask), {}),
    ]
    for dense, options in calls:
        exact = jax.nn.dot_product_attention(*qkv, *dense, **options)
        assert_close(jax_fa3.dot_product_attention(*qkv, *dense, **options), exact, 2e-2)


def test_takes_the_arguments_of_jax_nn():
    ours = inspect.signature(jax_fa3.dot_product_attention).parameters
    for name, parameter in inspect.signature(jax.nn.dot_product_attention).parameters.items():
        assert ours[name].kind == parameter.kind and ours[name].default == parameter.default


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("empty", ["B", "T", "S", "N"])
def test_empty(empty, implementation):
    """No rows, or rows that see no key; gradients too."""
    b, t, s, n, k = (
        0 if empty == x[0] else x[1] for x in (("B", B), ("T", T), ("S", S), ("N", N), ("N", K))
    )
    qkv = normal(b, t, n, H), normal(b, s, k, H), normal(b, s, k, V)
    lengths = jnp.zeros(b, jnp.int32) + 3

    def function(*qkv):
        return attention(
            *qkv, implementation=implementation, is_causal=True, query_seq_lengths=lengths
        )

    (out, lse), pullback = jax.vjp(function, *qkv)
    assert out.shape == (b, t, n, V) and not out.any()
    assert lse.shape == (b, t, n) and (lse == -jnp.inf).all()
    assert not any(x.any() for x in pullback((out, jnp.zeros_like(lse))))
    text = lower(lambda *x: attention(*x, is_causal=True), *(x.astype(jnp.bfloat16) for x in qkv))
    assert targets(text) == ([] if empty == "N" else [FWD])  # not even a call without heads


def test_packed():
    qkv = normal(B, T, N + 2 * K, H)
    parts = jnp.split(qkv, (N, N + K), axis=2)
    for name in ("causal", "window", "the rest"):
        exact = expected(*parts, **MASKS[name])
        for implementation in (None, "xla"):
            options = {"implementation": implementation, "return_residual": True, **MASKS[name]}
            assert_close(jax_fa3.qkv_dot_product_attention(qkv, K, **options), exact)
    single = jax_fa3.qkv_dot_product_attention(qkv[0], K, is_causal=True)
    assert_close(single, expected(*parts, is_causal=True)[0][0])
    qkv = qkv[:, :, :6].reshape(B, T, 3, 2, H)
    exact = expected(*(qkv[:, :, i] for i in range(3)))[0]
    assert_close(jax_fa3.qkv_dot_product_attention(qkv), exact)
    assert_close(jax_fa3.qkv_dot_product_attention(qkv[1]), exact[1])
    bias = jnp.zeros((1, 1, T, T))
    assert_close(jax_fa3.qkv_dot_product_attention(qkv, bias=bias, implementation="xla"), exact)


def test_lowers_to_the_call_alone():
    """For CUDA: no transposes, copies or concatenations; broadcasts are of no elements."""
    qkv = structs((B, T, N, H), (B, S, K, H), (B, S, K, V))
    text = lower(lambda *x: jax_fa3.dot_product_attention(*x, is_causal=True), *qkv)
    assert targets(text) == [FWD]
    assert operations(text) == {"custom_call", "broadcast_in_dim"}
    assert sorted(re.findall(r"broadcast_in_dim.*-> tensor<(.*)>", text)) == [
        "0xbf16",
        "0xf32",
        "0xi32",
        "0xui32",
    ]
    lengths = structs((B,), (B,), (B, T), (B, T), dtype=jnp.int32)
    names = "query_seq_lengths", "key_value_seq_lengths", "key_begin", "key_end"

    def masked(qkv, lengths):
        return attention(*qkv, **dict(zip(names, lengths, strict=True)), implementation="fa3")

    text = lower(masked, qkv, lengths)
    assert operations(text) == {"custom_call", "broadcast_in_dim", "transpose"}
    assert text.count("stablehlo.transpose") == 1  # of the log-sum-exp


def test_packed_lowers_to_the_call_alone():
    (packed,), (grouped,) = structs((B, T, 3, N, H)), structs((B, T, N + 2 * K, H))
    text = lower(jax_fa3.qkv_dot_product_attention, packed)
    assert operations(text) == {"custom_call", "broadcast_in_dim", "reshape"}
    assert "first_head_k = 4 : i64, first_head_q = 0 : i64, first_head_v = 8 : i64" in text
    text = lower(lambda qkv: jax_fa3.qkv_dot_product_attention(qkv, K), grouped)
    assert operations(text) == {"custom_call", "broadcast_in_dim"}
    assert "first_head_k = 4 : i64, first_head_q = 0 : i64, first_head_v = 6 : i64" in text
    assert "num_heads_k = 2 : i64, num_heads_q = 4 : i64" in text


def test_segments_lower_to_their_kernel():
    qkv = structs((B, T, N, H), (B, S, K, H), (B, S, K, V))
    ids = structs((B, T), (B, S), dtype=jnp.int32)

    def function(qkv, ids):
        return jax_fa3.dot_product_attention(
            *qkv, query_segment_ids=ids[0], key_value_segment_ids=ids[1]
        )

    text = lower(function, qkv, ids)
    assert targets(text) == [SEGMENTS, FWD]
    assert operations(text) == {"custom_call", "broadcast_in_dim"}  # nothing between the two
    assert sorted(re.findall(r"broadcast_in_dim.*-> tensor<(.*)>", text)) == [
        "0xbf16",
        "0xf32",
        "0xi32",
        "0xui32",
    ]
    assert targets(lower(function, qkv, ids, platform="cpu")) == []


def test_export():
    """One program for both platforms, of any B, T and S, differentiable."""
    b, t, s = jax.export.symbolic_shape("b, t, s")
    qkv = structs((b, t, N, H), (b, s, K, H), (b, s, K, V), dtype=jnp.float16)
    lengths = jax.ShapeDtypeStruct((b,), jnp.int32)

    def function(*arguments):
        *qkv, lengths = arguments
        return attention(*qkv, key_value_seq_lengths=lengths, is_causal=True)

    export = jax.export.export(
        jax.jit(function),
        platforms=("cpu", "cuda"),
        disabled_checks=jax_fa3.DISABLE_JAX_EXPORT_CHECKS,
    )
    exported = export(*qkv, lengths)
    assert targets(exported.mlir_module()) == [FWD]
    lengths = jnp.array([14, 5])
    exact = expected(*QKV, key_value_seq_lengths=lengths, is_causal=True)
    assert_close(exported.call(*QKV, lengths), exact)
