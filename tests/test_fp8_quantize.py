"""Quantization against NumPy, on a machine without a GPU, and what it lowers to."""

import functools
from typing import Any

import fp8_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lower, operations, targets

from jax_fa3 import fp8

B, T, N, H = 2, 200, 3, 64
E4M3 = jnp.float8_e4m3fn
QUANTIZE = "jax_fa3.quantize.v1"


pytestmark = pytest.mark.usefixtures("on_cpu")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def spread() -> np.ndarray:
    """Rows whose magnitudes spread a thousandfold, and a block of zeros."""
    x = normal(B, T, N, H) * np.logspace(-1, 2, T, dtype=np.float32)[:, None, None]
    x[1, :128, 2] = 0
    return x


def bits(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize])


@pytest.mark.parametrize("quantization", ["block", "head", "tensor"])
@pytest.mark.parametrize("lengths", [None, [130, 0]])
def test_quantize(quantization, lengths):
    x = spread()
    expected, scales = fp8_oracle.quantized(x, lengths, quantization)
    found, found_scales = fp8.quantize(x, lengths=lengths, quantization=quantization)
    assert (found.dtype, found_scales.dtype) == (E4M3, jnp.float32)
    assert found.shape == x.shape and found_scales.shape == (B, 2, N)
    # XLA divides by 448 as it likes, to 1 unit in the last place.
    np.testing.assert_array_max_ulp(np.asarray(found_scales), scales, 1)
    assert (bits(found) != bits(expected)).mean() < 1e-4
    assert quantization != "block" or (np.asarray(found_scales)[1, 0, 2] == 1)
    if lengths is None and quantization == "block":  # half a unit in the last place of 3 bits
        error = np.abs(fp8_oracle.dequantized(found, found_scales) - x)
        steps = np.repeat(scales, 128, axis=1)[:, :T, :, None]
        assert (error <= np.maximum(np.abs(x) / 16, steps * 2**-10) * 1.001).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_quantize_transforms_without_rounding(dtype):
    x, signs = jnp.asarray(spread(), dtype), fp8.random_signs(4, H)
    exact = fp8_oracle.transformed(np.asarray(x, np.float64), signs)
    expected, scales = fp8_oracle.quantized(exact)
    found, found_scales = fp8.quantize(x, signs=signs)
    np.testing.assert_allclose(found_scales, scales, rtol=1e-6)
    assert (bits(found) != bits(expected)).mean() < 1e-3
    values = np.asarray(found).astype(np.float32), expected.astype(np.float32)
    np.testing.assert_allclose(*values, rtol=0.13, atol=2**-9)  # never more than one step


@pytest.mark.parametrize("signs", [None, fp8_oracle.sylvester(H)[3]])
@pytest.mark.parametrize("lengths", [None, [130, 0]])
def test_quantize_without_the_mean(signs, lengths):
    x, mean = spread() + 5, normal(B, N, H, seed=1) + 5
    exact = x.astype(np.float64) - mean[:, None]
    if signs is not None:
        exact = fp8_oracle.transformed(exact, signs)
    expected, scales = fp8_oracle.quantized(exact, lengths)
    found, found_scales = fp8.quantize(x, lengths=lengths, signs=signs, mean=mean)
    np.testing.assert_allclose(found_scales, scales, rtol=1e-5)
    assert (bits(found) != bits(expected)).mean() < 2e-3
    one = fp8.quantize(x[0], lengths=None if lengths is None else 130, signs=signs, mean=mean[0])
    for a, b in zip(one, (found, found_scales), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b)[0])


def test_rows_past_the_lengths_do_not_count():
    x, lengths = spread(), np.array([130, 7])
    planted = x.copy()
    for entry, n in zip(planted, lengths, strict=True):
        entry[n::2], entry[n + 1 :: 2] = np.nan, np.inf
    for signs in (None, fp8.random_signs(0, H)):
        for quantization in ("block", "head", "tensor"):
            both = [
                fp8.quantize(a, lengths=lengths, quantization=quantization, signs=signs)
                for a in (x, planted)
            ]
            for clean, found in zip(*both, strict=True):
                np.testing.assert_array_equal(bits(clean), bits(found))
            for entry, n in zip(bits(both[1][0]), lengths, strict=True):
                assert not (entry[n:] & 0x7F).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("signs", [None, fp8_oracle.sylvester(H)[3]])
def test_what_is_not_finite_makes_its_block_nan(value, signs):
    x = spread()
    x[0, 150, 1, 9] = value
    found, scales = (np.asarray(a) for a in fp8.quantize(x, signs=signs))
    bad = np.zeros((B, 2, N), bool)
    bad[0, 1, 1] = True
    np.testing.assert_array_equal(np.isnan(scales), bad)
    wanted = np.repeat(bad, 128, axis=1)[:, :T, :, None].repeat(H, -1)
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), wanted)
    whole = fp8.quantize(x, quantization="tensor")[1]
    assert np.isnan(whole).all()


@pytest.mark.parametrize("size", [3e38, 1e-30, 2e-38, 1e-44])
def test_extreme_sizes(size):
    """Nothing saturates to NaN, and dividing by the scale is exact enough."""
    x = (normal(1, 70, 1, 64).clip(-1, 1) * np.float64(size)).astype(np.float32)
    found, scales = fp8.quantize(x)
    assert (np.asarray(scales) > 0).all() and np.isfinite(np.asarray(scales)).all()
    with np.errstate(under="ignore"):
        back = fp8_oracle.dequantized(found, scales)
    np.testing.assert_allclose(back, x, rtol=0.07, atol=max(size * 1e-3, 1e-37))


def test_without_batch_axis_and_empty():
    x = spread()
    found = fp8.quantize(x[0], lengths=150)
    for a, b in zip(found, fp8.quantize(x[:1], lengths=[150]), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b)[0])
    for shape in [(0, T, N, H), (B, 0, N, H), (B, T, 0, H)]:
        found, scales = fp8.quantize(jnp.zeros(shape), quantization="tensor")
        assert found.shape == shape and scales.shape == (shape[0], -(-shape[1] // 128), shape[2])


@pytest.mark.parametrize("quantization", ["block", "tensor"])
def test_vmap(quantization):
    """Of signs and lengths too."""
    xs = np.stack([spread(), 3 * spread()])
    signs = jnp.stack([fp8.random_signs(i, H) for i in range(2)])
    lengths = np.array([[200, 130], [5, 150]])

    def function(x, signs, lengths):
        return fp8.quantize(x, signs=signs, lengths=lengths, quantization=quantization)

    found = jax.jit(jax.vmap(function))(xs, signs, lengths)
    for i in range(2):
        for a, b in zip(found, function(xs[i], signs[i], lengths[i]), strict=True):
            np.testing.assert_array_equal(bits(a[i]), bits(b))


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (np.zeros((T, H)), {}, r"x: got shape \(200, 64\), wanted \(B, T, N, H\), or \(T, N, H\)"),
    (np.zeros((B, T, N, H), int), {}, "x: got dtype int32, wanted a floating dtype"),
    (jnp.zeros((B, T, N, H), E4M3), {}, "x: got dtype float8_e4m3fn, wanted 16 bits or more"),
    (jnp.zeros((B, T, N, H), jnp.float8_e5m2), {}, "x: got dtype float8_e5m2, wanted 16 bits"),
    (np.zeros((B, T, N, H)), {"quantization": "row"}, "quantization: got 'row', wanted 'block',"),
    (
        np.zeros((B, T, N, H)),
        {"mean": np.zeros(H)},
        r"mean: got float32\[64\], wanted float32\[2, 3, 64",
    ),
    (np.zeros((B, T, N, H)), {"lengths": [1]}, r"lengths: got shape \(1,\), wanted \(2,\)"),
    (np.zeros((B, T, N, H)), {"signs": np.ones(8)}, r"signs: got shape \(8,\), wanted \(64,\)"),
    (np.zeros((B, T, N, H)), {"implementation": "fa2"}, "implementation: got 'fa2', wanted None"),
    (
        np.zeros((B, T, N, 40)),
        {"signs": np.ones(40)},
        "x: got head dim 40, .* is 8, wanted a multiple of 16 for the Hadamard transform, or signs=",
    ),
]


@pytest.mark.parametrize(("x", "options", "message"), BAD)
def test_bad_input(x, options, message):
    with pytest.raises(ValueError, match=message):
        fp8.quantize(x, **options)


def test_has_no_derivative():
    def loss(x):
        return fp8.quantize(x)[1].sum()

    x = jnp.asarray(spread())
    jvp = lambda x: jax.jvp(loss, (x,), (x,))
    for derivative in (jax.grad(loss), jax.jit(jax.grad(loss)), jvp):
        with pytest.raises(NotImplementedError, match="what is quantized has no derivative"):
            derivative(x)
    assert not jax.grad(lambda x: loss(jax.lax.stop_gradient(x)))(x).any()


def struct(head_dim: int = H, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct((B, T, N, head_dim), dtype)


def test_lowers_to_the_call_alone():
    text = lower(fp8.quantize, struct())
    assert targets(text) == [QUANTIZE]
    assert operations(text) == {"custom_call", "broadcast_in_dim"}  # the latter: of no elements
    made = "-> (tensor<2x200x3x64xf8E4M3FN>, tensor<2x2x3xf32>, tensor<0xf8E4M3FN>)"
    assert (
        f": (tensor<2x200x3x64xbf16>, tensor<0xf32>, tensor<0xi32>, tensor<0xf32>) {made}" in text
    )

    def everything(x, signs, lengths):
        return fp8.quantize(x, signs=signs, lengths=lengths)

    extra = jax.ShapeDtypeStruct((H,), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.int32)
    text = lower(everything, struct(), *extra)
    assert operations(text) <= {"custom_call", "reshape", "broadcast_in_dim"}
    assert (
        f": (tensor<2x200x3x64xbf16>, tensor<64xf32>, tensor<2xi32>, tensor<0xf32>) {made}" in text
    )
    for quantization in ("head", "tensor"):
        function = functools.partial(fp8.quantize, quantization=quantization)
        assert targets(lower(function, struct())) == []
    stacked = jax.ShapeDtypeStruct((5, B, T, N, H), jnp.float16)
    flips = jax.ShapeDtypeStruct((5, H), jnp.float32)  # the kernel takes the same for all entries
    for axes, signs in (((0, None, None), extra[0]), ((0, 0, None), flips)):
        text = lower(jax.vmap(everything, axes), stacked, signs, extra[1])
        assert targets(text) == [QUANTIZE] and "(tensor<10x200x3x64xf16>, tensor<64xf32>, " in text
        assert ("multiply" in operations(text)) == (axes[1] == 0)


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({}, struct(dtype=jnp.float32), "x: got dtype float32, wanted bfloat16 or float16, or use"),
        ({}, struct(48), "x: got head dim 48, wanted a multiple of 16 from 64 to 256"),
        ({}, struct(264), r"x: got head dims \(264, 264\) in float8_e4m3fn, wanted"),
        ({"quantization": "head"}, struct(), "quantization: got 'head', wanted 'block', or use"),
    ],
)
def test_fa3_refuses(options, x, message):
    with pytest.raises(NotImplementedError, match=message):
        lower(lambda x: fp8.quantize(x, implementation="fa3", **options), x)
    assert targets(lower(lambda x: fp8.quantize(x, **options), x)) == []
