"""The kernel of FP8 attention on a Hopper GPU."""

import dataclasses
import functools
import re
from typing import Any

import fp8_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TABLE, Case
from helpers import Results, assert_rounded, equal, poison
from jax import Array
from long_cases import LONG

from jax_fa3 import fp8

pytestmark = pytest.mark.gpu

DIMS = [64, 80, 128, 192, 256]
quantized_attention = functools.partial(
    fp8.quantized_dot_product_attention, implementation="fa3", return_residual=True
)


def _table() -> list[tuple[Case, Any]]:
    """Every second case of the table and all long ones, head dims and dtypes in turn, and each head
    dim with every kind of block: whole, masked, short; and with more than are summed without a break.
    """
    cases = [case for case in TABLE if not case.name.startswith("head dims")][::2]
    cases += [case for case in TABLE if case.planted or "documents" in case.name] + LONG
    cases = list(dict.fromkeys(cases))
    turned = [dataclasses.replace(x, H=DIMS[i % 5], V=0) for i, x in enumerate(cases)]
    turned += [
        Case(f"head dim {h}, {name}", 300, 450, 4, 2, h, mask=mask)
        for h in DIMS
        for name, mask in (("full", {}), ("causal", {"is_causal": True, "query_offset": 150}))
    ]
    turned += [
        Case(f"head dim {h}, 100 blocks of keys, {name}", 130, 12738, 4, 2, h, B=1, mask=mask)
        for h in DIMS
        for name, mask in (
            ("full", {}),
            ("causal", {"is_causal": True, "query_offset": 12608}),
            ("window", {"local_window_size": (6000, 100), "query_offset": 9000}),
        )
    ]
    return [(case, (jnp.bfloat16, jnp.float16)[i // 5 % 2]) for i, case in enumerate(turned)]


@pytest.mark.parametrize("shifted", [False, True], ids=["mean 0", "mean 1"])
@pytest.mark.parametrize(("case", "dtype"), _table(), ids=str)
def test_table(case: Case, dtype: Any, shifted: bool):
    """By the tolerance rule: weights rounded to e4m3, scores and output as FP8 WGMMA sums them."""
    tensors, scales = fp8_oracle.scaled(case, shifted=shifted)
    poison(case, dtype)
    call = functools.partial(quantized_attention, dtype=dtype, **case.arguments)
    out, lse = jax.jit(call)(*tensors, *scales)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    inputs = fp8_oracle.all_dequantized(tensors, scales)
    exact = fp8_oracle.oracle(case, inputs)
    rounded = fp8_oracle.oracle(case, inputs, dtype, stepwise=True)
    assert_rounded(Results(out, lse), exact, rounded, case, jnp.finfo(dtype).eps)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("small", [1e-3, 1e-20])
def test_value_blocks_of_any_magnitude(head_dim: int, small: float):
    """One of zeros, whose scale is 1, among smaller numbers; and halves of rows far apart."""
    case = Case("magnitudes", 300, 1024, 2, 2, head_dim, B=1)
    q, k, v = case.inputs(jnp.bfloat16)
    halves = {"query_segment_ids": jnp.arange(300)[None] // 150}
    halves["key_value_segment_ids"] = jnp.arange(1024)[None] // 512
    values = (v.at[:, 256:384].set(0) * small, {}), (v.at[:, :512].mul(small), halves)
    for value, mask in values:
        quantized = [fp8.quantize(x) for x in (q, k, value)]
        operands = [x for x, _ in quantized] + [scale for _, scale in quantized]
        options = {"dtype": jnp.float32, **mask}
        found, wanted = (
            fp8.quantized_dot_product_attention(*operands, implementation=x, **options)
            for x in ("fa3", "xla")
        )
        error = jnp.linalg.norm(found - wanted, axis=(2, 3)) / jnp.linalg.norm(wanted, axis=(2, 3))
        assert error.max() < 0.1


@pytest.mark.parametrize("negative", ["all", "blocks of keys", "rows"])
@pytest.mark.parametrize("head_dim", DIMS)
def test_signs_of_scores(head_dim: int, negative: str):
    """The kernel takes maxima of positive scores by a way of their own."""
    case = Case("signs", 130, 900, 4, 2, head_dim, B=1)
    tensors, scales = fp8_oracle.scaled(case)
    query, key, value = (x.astype(jnp.float32) for x in tensors)
    query, key = abs(query), abs(key)
    if negative == "rows":
        query = jnp.where(jnp.arange(130)[:, None, None] % 3 == 0, query, -query)
    else:
        even = jnp.arange(900)[:, None, None] // 128 % 2 == 0  # not the last, which is taken first
        key = jnp.where((negative != "all") & even, key, -key)
    tensors = [x.astype(fp8_oracle.E4M3) for x in (query, key, value)]
    out, lse = quantized_attention(*tensors, *scales, **case.arguments)
    inputs = fp8_oracle.all_dequantized(tensors, scales)
    exact = fp8_oracle.oracle(case, inputs)
    rounded = fp8_oracle.oracle(case, inputs, jnp.bfloat16, stepwise=True)
    assert_rounded(Results(out, lse), exact, rounded, case, jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize("octaves", [0, 8], ids=["normal", "spread"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sums_are_those_of_the_oracle(head_dim: int, octaves: int):
    """To the last bit: of one key, the log-sum-exp is the score."""
    rng = np.random.default_rng(head_dim)

    def e4m3(length: int) -> np.ndarray:
        x = rng.standard_normal((64, length, 1, head_dim))
        x *= np.exp2(rng.uniform(-octaves, 0, x.shape))
        return (x * (448 / np.abs(x).max(-1, keepdims=True))).astype(fp8_oracle.E4M3)

    query, key, one = e4m3(128), e4m3(1), np.ones((), np.float32)
    scale = 2.0**-14
    _, lse = quantized_attention(query, key, key, one, one, one, scale=scale)
    wide = (jnp.asarray(x.astype(np.float32)) for x in (query, key))
    wanted = np.asarray(fp8_oracle.rounding(jnp.bfloat16).products(*wide))[:, 0, :, 0]
    # Sums have 14 bits, so the nearest others are 6e-5 of them away.
    np.testing.assert_allclose(np.asarray(lse)[:, :, 0] / scale, wanted, rtol=1e-6, atol=0.02)


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("head_dim", DIMS)
def test_sums_of_values_are_those_of_the_oracle(head_dim: int, mean: float):
    """Likewise, with weights that are powers of two: exact in e4m3, and as exponentials."""
    rng = np.random.default_rng(head_dim)
    exponents = -rng.integers(0, 10, 1000)
    exponents[-1] = 0  # the first block that the kernel sees has the maximum
    query, key = np.zeros((1, 64, 1, head_dim)), np.zeros((1, 1000, 1, head_dim))
    query[..., 0], key[0, :, 0, 0] = 1, exponents
    value = (mean + 0.3 * rng.standard_normal(key.shape)) * 100
    tensors = [jnp.asarray(x.astype(fp8_oracle.E4M3)) for x in (query, key, value)]
    one: Any = np.ones((), np.float32)
    options: Any = {"scale": np.log(2.0), "dtype": jnp.float32}
    out, _ = quantized_attention(*tensors, *[one] * 3, **options)
    weights = jnp.asarray(np.exp2(exponents), jnp.float32)
    summed = fp8_oracle.weighted(weights[None, None, None], tensors[2].astype(jnp.float32))[0, 0]
    wanted = np.broadcast_to(summed / weights.sum(), (64, head_dim))
    # What one more or less cut off would change is 1e-4 of a block's sum.
    np.testing.assert_allclose(np.asarray(out)[0, :, 0], wanted, rtol=3e-6, atol=1e-6 * 100)


CAUSAL = Case("causal", 300, 450, 4, 2, 128, mask={"is_causal": True, "query_offset": 150})
MANY = Case("many", 2048, 2048, 8, 2, 128, B=1, mask={"is_causal": True})


def test_fp32_results():
    tensors, scales = fp8_oracle.scaled(CAUSAL)
    call = functools.partial(quantized_attention, **CAUSAL.arguments)
    wide, narrow = (call(*tensors, *scales, dtype=x)[0] for x in (jnp.float32, jnp.bfloat16))
    assert wide.dtype == jnp.float32 and equal(wide.astype(jnp.bfloat16), narrow)


@pytest.mark.parametrize("head_dim", DIMS)
def test_bit_equal_200_times(head_dim: int):
    case = dataclasses.replace(MANY, H=head_dim)
    tensors, scales = fp8_oracle.scaled(case)
    call = jax.jit(functools.partial(quantized_attention, **case.arguments))
    first = call(*tensors, *scales)

    @jax.jit
    def same(x: Any, y: Any) -> Array:
        return jnp.array([jnp.array_equal(a, b) for a, b in zip(x, y, strict=True)]).all()

    for _ in range(5):
        poison(case, jnp.bfloat16)
        repeats = [same(first, call(*tensors, *scales)) for _ in range(40)]
        assert all(repeats)


def seen_by(case: Case, keys: slice) -> np.ndarray:
    """bool [T]: rows that see one of these keys, under a causal mask with an offset."""
    return np.arange(case.T) + case.mask["query_offset"] >= keys.start


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_bad_scales(which: int, bad: float):
    """NaN where they are used; other batch entries and heads as ever."""
    case = CAUSAL
    tensors, scales = fp8_oracle.scaled(case)
    call = jax.jit(functools.partial(quantized_attention, **case.arguments))
    clean = np.asarray(call(*tensors, *scales)[0], np.float32)
    broken = [np.array(x) for x in scales]
    broken[which][1, 1, 0] = bad
    out = np.asarray(call(*tensors, *broken)[0], np.float32)
    rows = np.zeros(case.T, bool)
    rows[128:256] = True
    rows = rows if which == 0 else seen_by(case, slice(128, 256))
    heads = 1 if which == 0 else 2
    assert np.isnan(out[1, rows, :heads]).all()
    np.testing.assert_array_equal(out[0], clean[0])
    np.testing.assert_array_equal(out[1, :, heads:], clean[1, :, heads:])


def test_a_nan_key_reaches_the_rows_that_see_it():
    tensors, scales = fp8_oracle.scaled(CAUSAL)
    tensors[1] = tensors[1].at[0, 300, 1, 5].set(jnp.nan)
    out, lse = quantized_attention(*tensors, *scales, **CAUSAL.arguments)
    wanted = np.zeros(lse.shape, bool)
    wanted[0, seen_by(CAUSAL, slice(300, 301)), 2:] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(lse)), wanted)
    np.testing.assert_array_equal(np.isnan(np.asarray(out, np.float32)).all(-1), wanted)


@pytest.mark.parametrize("any_scale", [np.nan, 3e38])
def test_padding_may_have_any_scale(any_scale: float):
    lengths: Any = {"query_seq_lengths": [128, 0], "key_value_seq_lengths": [256, 128]}
    tensors, scales = fp8_oracle.scaled(CAUSAL)
    call = jax.jit(functools.partial(quantized_attention, **lengths))
    clean = call(*tensors, *scales)
    scales = [np.array(x) for x in scales]
    scales[0][:, 1:] = any_scale
    scales[1][:, 2:], scales[2][:, 2:] = any_scale, any_scale
    assert equal(clean, call(*tensors, *scales))


NO_WORK = {"parameter", "custom-call", "get-tuple-element", "tuple", "constant", "bitcast"}


def test_is_one_kernel():
    """No copies, transposes or anything else around the custom call."""
    tensors, scales = fp8_oracle.scaled(CAUSAL)

    def call(*operands: Any) -> Array:
        return quantized_attention(*operands, is_causal=True)[0]

    text = jax.jit(call).lower(*tensors, *scales).compile().as_text()
    assert text is not None and text.count('custom_call_target="jax_fa3.fwd_fp8.v1"') == 1
    found = re.findall(r"^\s+(?:ROOT )?\S+ = .*?[\]})] ([a-z][\w-]*)\(", text, re.MULTILINE)
    assert set(found) - {"fusion"} <= NO_WORK
