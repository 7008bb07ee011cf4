"""Attention of 16-bit arrays in FP8 on a machine without a GPU: numbers, bad input, what it lowers to."""

from typing import Any

import fp8_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from helpers import Results, assert_close, assert_rounded
from lowering import lower, operations, targets
from masks import documents, packed

import jax_fa3
from jax_fa3 import _dispatch, fp8

QUANTIZE, FWD = "jax_fa3.quantize.v1", "jax_fa3.fwd_fp8.v1"
CASE = Case("fp8", 140, 260, 4, 2, 64, B=2, mask={"is_causal": True, "query_offset": 60})
QKV = CASE.inputs(jnp.float16)
KEYS = jax.random.split(jax.random.key(0))


pytestmark = pytest.mark.usefixtures("on_cpu")


def attention(*qkv: Any, **options: Any) -> Any:
    return fp8.dot_product_attention(*qkv, **{"return_residual": True} | options)


def shifted(qkv: Any) -> list[Any]:
    """Values around 1, and keys of which one channel is 20 everywhere."""
    q, k, v = (x.astype(jnp.float32) for x in qkv)
    return [x.astype(qkv[0].dtype) for x in (q, k.at[..., 3].add(20), 1 + 0.3 * v)]


@pytest.mark.parametrize("quantization", ["block", "head", "tensor"])
@pytest.mark.parametrize("key", [None, jax.random.key(5)], ids=["none", "key"])
@pytest.mark.parametrize("smooth", [True, False])
def test_is_made_of_its_parts(key, quantization, smooth):
    qkv = shifted([x.astype(jnp.float32) for x in QKV])
    lengths = {"query_seq_lengths": [140, 100], "key_value_seq_lengths": [250, 260]}
    signs = None if key is None else fp8.random_signs(key, 64)
    kinds = (
        (signs, lengths["query_seq_lengths"]),
        (signs, lengths["key_value_seq_lengths"]),
        (None, lengths["key_value_seq_lengths"]),
    )
    means: Any = [None, None, None]
    if smooth:
        means[1:] = (fp8.token_mean(x, lengths=[250, 260]) for x in qkv[1:])
        assert (abs(means[1][..., 3] - 20) < 1).all() and (abs(means[2] - 1) < 0.3).all()
    pairs = [
        fp8.quantize(x, signs=s, lengths=n, mean=m, quantization=quantization)
        for x, (s, n), m in zip(qkv, kinds, means, strict=True)
    ]
    options: Any = dict(CASE.mask) | lengths | {"return_residual": True}
    parts: Any = zip(*pairs, strict=True)
    out, lse = fp8.quantized_dot_product_attention(
        *(x for p in parts for x in p), dtype="float32", value_mean=means[2], **options
    )
    if smooth:
        key_mean = jnp.repeat(means[1], 2, axis=1)
        lse += jnp.einsum("btnh,bnh->btn", qkv[0], key_mean) * 64**-0.5
    exact = out, lse
    options |= {"incoherent_key": key, "quantization": quantization}
    options |= {"smooth_k": smooth, "smooth_v": smooth}
    found = fp8.dot_product_attention(*qkv, **options)
    assert_close(found, exact, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", [list, shifted], ids=["mean 0", "shifted"])
def test_error_is_that_of_quantization(dtype, kind):
    """By the tolerance rule, against attention of the arrays as they are. What is taken out before they
    are quantized leaves fewer errors."""
    inputs = kind(CASE.inputs(dtype))
    out, lse = attention(*inputs, **CASE.mask)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    wide = [np.asarray(x, np.float32) for x in inputs]
    signs = fp8.random_signs(0, 64)
    pairs = [fp8_oracle.quantized(fp8_oracle.transformed(x, signs)) for x in wide[:2]]
    dequantized = fp8_oracle.all_dequantized(
        *zip(*pairs, fp8_oracle.quantized(wide[2]), strict=True)
    )
    exact = fp8_oracle.oracle(CASE, [jnp.asarray(x) for x in wide])
    rounded = fp8_oracle.oracle(CASE, dequantized, dtype)
    assert_rounded(Results(out, lse), exact, rounded, CASE, 2**-7)


def relative_errors(qkv: Any, mask: dict[str, Any], **options: Any) -> np.ndarray:
    """Of each row."""
    exact = jax_fa3.dot_product_attention(*qkv, **mask)
    error = fp8.dot_product_attention(*qkv, **mask, **options) - exact
    return np.sqrt((error**2).sum((0, 2, 3)) / (exact**2).sum((0, 2, 3)))


def test_what_the_two_techniques_are_for():
    """Outliers (the paper's inputs, its section 4.3); values whose magnitudes spread a millionfold."""
    rng = np.random.default_rng(0)
    shape = 3, 1, 512, 2, 64
    outliers = 10 * rng.standard_normal(shape) * (rng.random(shape) < 0.001)
    qkv = [jnp.asarray(x, jnp.float32) for x in rng.standard_normal(shape) + outliers]
    plain = relative_errors(qkv, {}, incoherent_key=None).mean()
    assert relative_errors(qkv, {}).mean() < 0.9 * plain
    q, k, v = (jnp.asarray(x, jnp.float32) for x in rng.standard_normal(shape))
    v *= jnp.logspace(-6, 0, 512)[:, None, None]
    options: Any = {"mask": {"local_window_size": 8}, "incoherent_key": None}
    assert relative_errors((q, k, v), **options).max() < 0.1
    assert relative_errors((q, k, v), **options, quantization="tensor").max() > 0.9


def test_vmap_of_keys():
    found = jax.vmap(lambda key: attention(*QKV, incoherent_key=key))(KEYS)
    for i in range(2):
        one = attention(*QKV, incoherent_key=KEYS[i])
        assert_close([x[i] for x in found], one, 2e-3)
    assert (np.asarray(found[0][0]) != np.asarray(found[0][1])).any()


def test_a_nan_reaches_what_sees_its_block():
    q, k, v = QKV
    out = attention(q, k.at[0, 200, 1, 3].set(jnp.nan), v, **CASE.mask)[0]
    wanted = np.zeros((2, 140, 4), bool)
    wanted[0, 68:, 2:] = True  # those that see key 128
    np.testing.assert_array_equal(np.isnan(np.asarray(out)).any(-1), wanted)


def structs(head_dim: int = 64, head_dim_v: int = 0, dtype: Any = jnp.bfloat16) -> list[Any]:
    shapes = (2, 140, 4, head_dim), (2, 260, 2, head_dim), (2, 260, 2, head_dim_v or head_dim)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def test_lowers_to_the_calls_alone():
    plain = {"smooth_k": False, "smooth_v": False}
    text = lower(lambda *x: fp8.dot_product_attention(*x, is_causal=True, **plain), *structs())
    assert targets(text) == [QUANTIZE] * 3 + [FWD]
    assert operations(text) == {"custom_call", "broadcast_in_dim", "reshape"}
    assert text.count("tensor<1x64xf32>) -> tensor<64xf32>") == text.count("stablehlo.reshape") == 2
    ids = packed(documents(100, 40), documents(60, 200))
    ids = {k: np.repeat(x, 2, 0) for k, x in ids.items()}
    text = lower(lambda *x: fp8.dot_product_attention(*x, is_causal=True), *structs())
    assert targets(text) == [QUANTIZE] * 3 + [FWD]
    text = lower(lambda *x: attention(*x, **ids, quantization="head"), *structs())
    assert targets(text) == ["jax_fa3.segment_intervals.v1", FWD]
    for options, platform in (({}, "cpu"), ({"implementation": "xla"}, "cuda")):
        assert (
            targets(lower(lambda *x, o=options: attention(*x, **o), *structs(), platform=platform))
            == []
        )


REFUSED = [
    (structs(dtype=jnp.float32), "query: got dtype float32, wanted bfloat16 or float16"),
    (structs(48), "query: got head dim 48, wanted a multiple of 16 from 64 to 256 in FP8"),
    (structs(128, 64), "value: got head dim 64 beside 128 of query, wanted the same in FP8"),
]


@pytest.mark.parametrize(("operands", "message"), REFUSED)
def test_fa3_refuses(operands, message, monkeypatch):
    with pytest.raises(NotImplementedError, match=f"implementation='fa3': {message}"):
        lower(lambda *x: attention(*x, implementation="fa3"), *operands)
    monkeypatch.setattr(_dispatch, "compute_capabilities", lambda: {"9.0"})
    with pytest.warns(UserWarning, match=f"runs this on XLA. {message}"):
        assert targets(lower(attention, *operands)) == []


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (
        structs(dtype=jnp.float8_e4m3fn),
        {},
        "query: got dtype float8_e4m3fn, wanted 16 bits or more",
    ),
    (structs(40), {}, "query: got head dim 40, .* the Hadamard transform, or incoherent_key=None"),
    (structs(), {"incoherent_key": 0.5}, "key: got 0.5, wanted a static int"),
    (structs(), {"incoherent_key": KEYS}, r"key: got key<fry>\[2\], wanted an int, or one key of"),
    (structs(), {"smooth_v": None}, "smooth_v: got None, wanted True or False"),
    (structs(), {"smooth_k": 1}, "smooth_k: got 1, wanted True or False, or None"),
    (
        structs(),
        {"smooth_k": True, "logits_soft_cap": 5.0},
        "smooth_k: got True, wanted False or None beside logits_soft_cap",
    ),
    (structs(), {"quantization": "row"}, "quantization: got 'row', wanted 'block', 'head' or"),
    (structs(), {"query_seq_lengths": [1]}, r"query_seq_lengths: got shape \(1,\)"),
]


@pytest.mark.parametrize(("operands", "options", "message"), BAD)
def test_bad_input(operands, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: attention(*x, **options), *operands)


def test_not_implemented():
    for name, x in (("bias", jnp.zeros((140, 260))), ("mask", jnp.ones((140, 260), bool))):
        with pytest.raises(NotImplementedError, match=f"{name}: got a dense array, .* jax_fa3.fp8"):
            attention(*QKV, **{name: x})
    with pytest.raises(NotImplementedError, match="scale: got an array, .* multiply query by it"):
        jax.eval_shape(lambda x: attention(*QKV, scale=x), jnp.float32(1))
