"""Value that quantize wrote with its keys innermost."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lower, operations, targets

from jax_fa3 import fp8
from jax_fa3._targets import FWD_FP8, QUANTIZE

B, T, S, N, K, H = 2, 140, 260, 4, 2, 64
MEAN = jnp.linspace(-1, 1, B * K * H).reshape(B, K, H)


def arrays() -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return [jnp.asarray(1 + 0.3 * rng.standard_normal(x), jnp.bfloat16) for x in shapes]


def prepared(transposed: bool, **options: Any) -> tuple[Any, ...]:
    """Arguments of quantized_dot_product_attention."""
    query, key, value = arrays()
    how = {"transposed": transposed, "mean": MEAN, **options}
    tensors, scales = zip(
        fp8.quantize(query), fp8.quantize(key), fp8.quantize(value, **how), strict=True
    )
    return *tensors, *scales


def test_where_each_number_is():
    """Within each 16 keys, slot 4 c + q is key 8 (q // 2) + 2 c + q % 2."""
    value = arrays()[2].at[1, 200:].set(jnp.nan).at[0, 3].set(jnp.inf)
    lengths = [S, 200]
    plain, scales = fp8.quantize(value, lengths=lengths)
    found, same = fp8.quantize(value, lengths=lengths, transposed=True)
    assert found.shape == (B, K, H, 384) and found.dtype == plain.dtype
    np.testing.assert_array_equal(scales, same)
    wanted = np.zeros((B, K, H, 384), np.float32)
    for key in range(S):
        c, q = key % 8 // 2, key % 16 // 8 * 2 + key % 2
        wanted[..., key // 16 * 16 + 4 * c + q] = np.asarray(plain[:, key], np.float32)
    wanted[0, :, :, :128] = 0  # their scale is NaN
    np.testing.assert_array_equal(np.asarray(found, np.float32), wanted)


@pytest.mark.parametrize("quantization", ["block", "head", "tensor"])
def test_attention_is_the_same(quantization: Any):
    plain, transposed = (prepared(x, quantization=quantization) for x in (False, True))
    options: Any = {"value_mean": MEAN, "is_causal": True, "dtype": jnp.float32}
    wanted = fp8.quantized_dot_product_attention(*plain, **options)
    found = fp8.quantized_dot_product_attention(*transposed, value_transposed=True, **options)
    np.testing.assert_array_equal(found, wanted)
    alone = [x[0] for x in transposed]
    options |= {"value_mean": MEAN[0], "value_transposed": True}
    found = fp8.quantized_dot_product_attention(*alone, **options)
    np.testing.assert_array_equal(found, wanted[0])
    stacked = [jnp.stack([x, x]) for x in alone]
    found = jax.vmap(lambda *x: fp8.quantized_dot_product_attention(*x, **options))(*stacked)
    np.testing.assert_array_equal(found[1], wanted[0])


def test_lowers_to_the_calls_alone():
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in prepared(True)]
    text = lower(
        lambda *x: fp8.quantized_dot_product_attention(*x, value_transposed=True), *structs
    )
    assert targets(text) == [FWD_FP8]
    assert operations(text) == {"custom_call", "broadcast_in_dim"}  # the latter: of no elements
    assert "tensor<2x2x64x384xf8E4M3FN>) -> " in text and "xui8>" in text
    assert "tensor<2x260x2x64xf8E4M3FN>, tensor<0xf8E4M3FN>, " in text
    struct = jax.ShapeDtypeStruct((B, S, K, H), jnp.bfloat16)
    text = lower(lambda x: fp8.quantize(x, transposed=True), struct)
    assert targets(text) == [QUANTIZE] and "-> (tensor<0xf8E4M3FN>, tensor<2x3x2xf32>, " in text


def test_16_bits_make_it_so():
    """Where the kernel quantizes."""
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays()]
    shapes: Any = (("block", "tensor<0xui8>)"), ("head", "tensor<2x2x64x384xui8>)"))
    for quantization, shape in shapes:
        call = functools.partial(fp8.dot_product_attention, quantization=quantization)
        assert shape in lower(call, *structs)


def test_refusals():
    plain, found = prepared(False), prepared(True)
    call: Any = fp8.quantized_dot_product_attention
    with pytest.raises(
        ValueError, match=r"value: got shape \(2, 260, 2, 64\), wanted \(2, 2, 64, 384\)"
    ):
        call(*plain, value_transposed=True)
    with pytest.raises(ValueError, match=r"value: got "):
        call(*found)
    with pytest.raises(ValueError, match="value_transposed: got 'yes', wanted True or False"):
        call(*found, value_transposed="yes")
    with pytest.raises(ValueError, match="transposed: got 1, wanted True or False"):
        fp8.quantize(arrays()[2], transposed=1)  # pyright: ignore[reportArgumentType]
