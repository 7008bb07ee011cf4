"""Attention of e4m3 arrays on a machine without a GPU: numbers, bad input, what it lowers to."""

import types
from typing import Any

import fp8_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TABLE, Case
from helpers import Results, assert_same
from lowering import lower, operations, targets
from masks import ints

import jax_fa3
from jax_fa3 import _dispatch, _ffi, _row_blocks, fp8

FWD = "jax_fa3.fwd_fp8.v1"
E4M3 = jnp.float8_e4m3fn
CASES = {case.name: case for case in TABLE}
B, T, S, N, K, H = 2, 140, 260, 4, 2, 64


pytestmark = pytest.mark.usefixtures("on_cpu")


def attention(*operands: Any, **options: Any) -> Any:
    defaults = {"dtype": jnp.float32, "return_residual": True}
    return fp8.quantized_dot_product_attention(*operands, **defaults | options)


NAMES = [
    *("300x1", "129x127", "head dims 192, 128", "soft cap, scale, window", "batch 0", "S = 0"),
    *("rows see nothing at first", "planted, causal", "planted, all keys"),
    *("any intervals, causal", "two batches of documents"),
]


@pytest.mark.parametrize("name", NAMES)
def test_numbers(name, monkeypatch):
    """The dequantized numbers, in fp32; NaN past the lengths does not show."""
    monkeypatch.setattr(_row_blocks, "BLOCK_SCORES", 2**18)
    case = CASES[name]
    tensors, scales = fp8_oracle.scaled(case)
    out, lse = attention(*tensors, *scales, **case.arguments)
    assert out.dtype == lse.dtype == jnp.float32
    exact = fp8_oracle.oracle(case, fp8_oracle.all_dequantized(tensors, scales))
    assert_same(Results(out, lse), exact, rtol=1e-5)


SMALL = Case("small", T, S, N, K, H, B=B, mask={"is_causal": True, "query_offset": 60})
TENSORS, SCALES = fp8_oracle.scaled(SMALL)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, "float32"])
def test_result_dtypes(dtype):
    out, exact = (attention(*TENSORS, *SCALES, dtype=x)[0] for x in (dtype, jnp.float32))
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, exact.astype(dtype))


def test_scales_of_size_1_are_for_all():
    forms: list[tuple[Any, Any, Any]] = [
        (0.5, 0.25, 3),
        (np.float64(0.5), jnp.float32(0.25), np.full((1, 1, 1), 3.0)),
        (np.full((B, 1, N), 0.5), jnp.full((1, 3, 1), 0.25), jnp.full((B, 3, 1), 3.0)),
    ]
    full = [np.full(x.shape, s, np.float32) for x, s in zip(SCALES, forms[0], strict=True)]
    exact = attention(*TENSORS, *full, is_causal=True)
    for scales in forms:
        for x, y in zip(attention(*TENSORS, *scales, is_causal=True), exact, strict=True):
            np.testing.assert_array_equal(x, y)


def test_without_batch_axis():
    exact = attention(*TENSORS, *SCALES, **SMALL.arguments, key_value_seq_lengths=[200, 90])
    for length in (90, [90]):
        entry = [x[1] for x in (*TENSORS, *SCALES)]
        found = attention(*entry, **SMALL.arguments, key_value_seq_lengths=length)
        for x, y in zip(found, exact, strict=True):
            np.testing.assert_allclose(x, y[1], atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, -np.inf])
def test_bad_scales_make_nan_of_the_rows_that_see_them(bad):
    """Of those rows alone: blocks 0 and 1 of queries, 0 to 2 of keys; causal from key 60 on."""
    rows = np.arange(T)
    for which, block, seen in [(0, 1, rows >= 128), (1, 1, rows >= 68), (2, 1, rows >= 68)]:
        scales = [np.array(s) for s in SCALES]
        scales[which][1, block, 0] = bad
        out, lse = (np.asarray(x) for x in attention(*TENSORS, *scales, **SMALL.arguments))
        wanted = np.zeros((B, T, N), bool)
        wanted[1, :, : 1 if which == 0 else N // K] = seen[:, None]
        np.testing.assert_array_equal(np.isnan(out), wanted[..., None].repeat(H, -1))
        if which < 2:
            np.testing.assert_array_equal(np.isnan(lse), wanted)


def test_scales_of_padding_mean_nothing():
    lengths = {"query_seq_lengths": ints(128, 0), "key_value_seq_lengths": ints(128, 128)}
    scales = [np.array(s) for s in SCALES]
    exact = attention(*TENSORS, *scales, **lengths)
    for scale in scales:
        scale[:, 1:] = np.nan
    for x, y in zip(attention(*TENSORS, *scales, **lengths), exact, strict=True):
        np.testing.assert_array_equal(x, y)


def test_vmap_and_jit():
    queries = jnp.stack([TENSORS[0], TENSORS[0][::-1]])
    scales = jnp.stack([SCALES[0], 2 * SCALES[0]])

    def function(query, scale, lengths):
        others = *TENSORS[1:], scale, *SCALES[1:]
        return attention(query, *others, key_value_seq_lengths=lengths)

    lengths = jnp.array([[200, 10], [0, 260]])
    found = jax.jit(jax.vmap(function))(queries, scales, lengths)
    for i in range(2):
        for x, y in zip(found, function(queries[i], scales[i], lengths[i]), strict=True):
            np.testing.assert_allclose(x[i], y, atol=1e-6)


Q, K_, V = TENSORS
WIDE = Q.astype(jnp.bfloat16)
BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"query": WIDE}, {}, "query: got dtype bfloat16, wanted float8_e4m3fn: jax_fa3.fp8.quantize"),
    ({"key": K_.astype(jnp.float8_e5m2)}, {}, "key: got dtype float8_e5m2, wanted float8_e4m3fn"),
    ({"value": V.astype(jnp.int8)}, {}, "value: got dtype int8, wanted float8_e4m3fn"),
    ({"key": K_[:, :, :, :32]}, {}, r"key: got shape \(2, 260, 2, 32\), wanted \(2, S, K, 64\)"),
    ({"query": Q[0, 0]}, {}, r"query: got shape \(4, 64\), wanted \(B, T, N, H\)"),
    ({"query_scale": None}, {}, "query_scale: got None, wanted fp32 scales"),
    ({"value_scale": SCALES[2].astype(jnp.float16)}, {}, "value_scale: got dtype float16, wanted"),
    (
        {"key_scale": SCALES[1][:, :2]},
        {},
        r"key_scale: got shape \(2, 2, 2\), wanted \(2, 3, 2\), \[B, blocks of 128 rows, heads\]",
    ),
    ({"query_scale": SCALES[0][0]}, {}, r"query_scale: got shape \(2, 4\), wanted \(2, 2, 4\)"),
    ({}, {"dtype": jnp.float64}, "dtype: got .*float64.*, wanted bfloat16, float16 or float32"),
    ({}, {"dtype": E4M3}, "dtype: got .*, wanted bfloat16, float16 or float32"),
    ({}, {"deterministic_backward": True}, "deterministic_backward: got True, wanted False"),
    ({}, {"is_causal": 1}, "is_causal: got 1, wanted True or False"),
    ({}, {"implementation": "fa2"}, "implementation: got 'fa2'"),
]


@pytest.mark.parametrize(("operands", "options", "message"), BAD)
def test_bad_input(operands, options, message):
    names = "query", "key", "value", "query_scale", "key_scale", "value_scale"
    good = dict(zip(names, (*TENSORS, *SCALES), strict=True))
    with pytest.raises(ValueError, match=message):
        fp8.quantized_dot_product_attention(**good | operands, **options)


def test_not_implemented():
    for name, x in (("bias", jnp.zeros((T, S))), ("mask", jnp.ones((T, S), bool))):
        with pytest.raises(NotImplementedError, match=f"{name}: got a dense array, .* jax_fa3.fp8"):
            attention(*TENSORS, *SCALES, **{name: x})
    with pytest.raises(NotImplementedError, match="scale: got an array, .* multiply query_scale"):
        jax.eval_shape(lambda x: attention(*TENSORS, *SCALES, scale=x), jnp.float32(1))


@pytest.mark.parametrize("argument", range(6))
def test_has_no_derivative(argument):
    def loss(*operands):
        return attention(*operands)[0].sum()

    operands = *TENSORS, *SCALES
    tangents = [jnp.zeros_like(x) for x in operands]
    message = "what is quantized has no derivative: differentiate jax_fa3.fp8.dot_product_attention"
    for derivative in (jax.grad(loss, argument), lambda *x: jax.jvp(loss, x, tuple(tangents))):
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(derivative, *operands)


def structs(head_dim: int = H, head_dim_v: int = 0) -> list[Any]:
    shapes = (B, T, N, head_dim), (B, S, K, head_dim), (B, S, K, head_dim_v or head_dim)
    tensors = [jax.ShapeDtypeStruct(x, E4M3) for x in shapes]
    return [*tensors, *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in SCALES)]


def call(**options: Any) -> Any:
    return lambda *x: fp8.quantized_dot_product_attention(*x, **options)


def test_lowers_to_the_call_alone():
    text = lower(call(is_causal=True), *structs())
    assert targets(text) == [FWD]
    assert operations(text) == {"custom_call", "broadcast_in_dim"}  # the latter: of no elements
    shapes = "2x140x4x64xf8E4M3FN, 2x260x2x64xf8E4M3FN, 2x260x2x64xf8E4M3FN, "
    shapes += "2x2x4xf32, 2x3x2xf32, 2x3x2xf32, 0xf32, " + "0xi32, " * 5 + "0xf32, 0xf8E4M3FN, "
    operands = ", ".join(f"tensor<{shape}>" for shape in shapes.split(", ")[:-1])
    made = "tensor<2x140x4x64xbf16>, tensor<2x4x140xf32>, tensor<14xi32>, tensor<2x2x64x384xui8>"
    assert f": ({operands}) -> ({made})" in text
    assert "soft_cap = 0.000000e+00 : f32" in text and "window_right = 0 : i64" in text
    text = lower(call(dtype=jnp.float32, implementation="fa3"), *structs())
    assert "-> (tensor<2x140x4x64xf32>, tensor<2x4x140xf32>, " in text
    assert targets(lower(call(), *structs(), platform="cpu")) == []
    with pytest.raises(NotImplementedError, match="lowered for platform cpu"):
        attention(*TENSORS, *SCALES, implementation="fa3")


def test_vmap_lowers_to_one_call():
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in structs()]
    text = lower(jax.vmap(call()), *stacked)
    assert targets(text) == [FWD] and "while" not in operations(text)
    assert "(tensor<6x140x4x64xf8E4M3FN>, " in text


REFUSED = [
    ({}, structs(48), "query: got head dim 48, wanted a multiple of 16 from 64 to 256 in FP8"),
    ({}, structs(72), "query: got head dim 72, wanted a multiple of 16 from 64 to 256 in FP8"),
    ({}, structs(320), r"query: got head dims \(320, 320\) in float8_e4m3fn, wanted"),
    ({}, structs(128, 64), "value: got head dim 64 beside 128 of query, wanted the same in FP8"),
    ({"scale": -1.0}, structs(), "scale: got -1.0, wanted a positive float32"),
    (
        {"logits_soft_cap": 1e-39},
        structs(),
        "logits_soft_cap: got 1e-39, wanted a positive float32",
    ),
]


@pytest.mark.parametrize(("options", "operands", "message"), REFUSED)
def test_fa3_refuses(options, operands, message):
    """And None takes XLA."""
    with pytest.raises(NotImplementedError, match=f"implementation='fa3': {message}"):
        lower(call(implementation="fa3", **options), *operands)
    assert targets(lower(call(**options), *operands)) == []


@pytest.mark.parametrize("kernels", [None, [("bfloat16", 64, 64)]])
def test_hopper_gpu_without_the_kernels(monkeypatch, kernels):
    """An install with none, or with those of 16 bits alone."""
    versions = {"driver_version": lambda: 13000, "runtime_version": lambda: 13000}
    module = kernels and types.SimpleNamespace(kernels=lambda: kernels, **versions)
    monkeypatch.setattr(_ffi, "_C", module)
    monkeypatch.setattr(_dispatch, "compute_capabilities", lambda: {"9.0"})
    reason = "an install without CUDA kernels" if kernels is None else r"in float8_e4m3fn, .* \[\]"
    with pytest.warns(UserWarning, match=f"runs this on XLA.*{reason}"):
        assert targets(lower(call(), *structs())) == []
    with pytest.raises(NotImplementedError, match=reason):
        lower(call(implementation="fa3"), *structs())
    assert jax_fa3.is_supported(WIDE, WIDE, WIDE) is None or kernels is None
