"""The transposition of V for FP8 attention on a Hopper GPU: as it is quantized, beside many tiles, or by a
kernel before."""

import functools
from typing import Any

import fp8_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from helpers import equal

from jax_fa3 import fp8

pytestmark = pytest.mark.gpu

quantized_attention = functools.partial(
    fp8.quantized_dot_product_attention, implementation="fa3", return_residual=True
)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_many_tiles(head_dim: int):
    """A CTA that has several tiles of many blocks gets what it gets for each alone."""
    case = Case("tiles", 2000, 4500, 16, 16, head_dim, B=1)
    tensors, scales = fp8_oracle.scaled(case)
    call = jax.jit(functools.partial(quantized_attention, **case.arguments))
    out, lse = call(*tensors, *scales)
    for head in (0, 7, 15):
        alone = [x[:, :, head : head + 1] for x in (*tensors, *scales)]
        assert equal(call(*alone), (out[:, :, head : head + 1], lse[:, :, head : head + 1]))


LENGTHS = {"query_seq_lengths": [1100, 900], "key_value_seq_lengths": [1400, 700]}


@pytest.mark.parametrize("mask", [{}, LENGTHS, {**LENGTHS, "is_causal": True}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_value_transposed_beside_the_tiles(head_dim: int, mask: Any):
    """With many tiles the forward transposes V itself, with few a kernel does it before: the same
    comes out, bit by bit, whatever an earlier call left in the workspace."""
    case = Case("beside", 1100, 1500, 32, 8, head_dim, mask=mask, planted=True)
    call = jax.jit(functools.partial(quantized_attention, **case.arguments))
    calls = []
    for seed in range(2):
        tensors, scales = fp8_oracle.scaled(case, seed)
        scales[2] = scales[2].at[1, 2, 5].set(jnp.nan)
        out, lse = call(*tensors, *scales)
        for head in (0, 5, 7):
            group = slice(4 * head, 4 * head + 4)
            heads = group, *[slice(head, head + 1)] * 2
            alone = [x[:, :, h] for x, h in zip((*tensors, *scales), heads * 2, strict=True)]
            assert equal(call(*alone), (out[:, :, group], lse[:, :, group]))
        calls.append(((*tensors, *scales), (out, lse)))
    for _ in range(20):
        for operands, results in calls:
            assert equal(call(*operands), results)


@pytest.mark.parametrize("shifted", [False, True], ids=["mean 0", "mean 1"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize(
    ("lengths", "heads"),
    [((100, 1), (2, 1)), ((300, 450), (4, 2)), ((900, 1500), (32, 8)), ((64, 256), (5, 5))],
    ids=str,
)
def test_value_transposed_as_it_is_quantized(
    lengths: Any, heads: Any, head_dim: int, dtype: Any, shifted: bool
):
    """What comes out is that of value quantized as it stands, bit by bit: with padding that holds NaN,
    without a mean, and where a block's scale is none."""
    (length, keys), (n, k) = lengths, heads
    case = Case("quantized", length, keys, n, k, head_dim)
    query, key, value = case.inputs(dtype)
    value = value * 0.3 + 1 if shifted else value
    if keys > 300:
        value = value.at[0, keys // 2, 0, 3].set(jnp.inf)
    counts = jnp.array([keys, keys // 2], jnp.int32)
    value = value.at[1, keys // 2 :].set(jnp.nan)
    quantize = functools.partial(fp8.quantize, implementation="fa3")
    (q8, q_scale), (k8, k_scale) = quantize(query), quantize(key)
    for mean in (None, jax.random.normal(jax.random.key(0), (2, k, head_dim))):
        options: Any = {"key_value_seq_lengths": counts, "dtype": dtype, "value_mean": mean}
        results = []
        for transposed in (False, True):
            how: Any = {"lengths": counts, "mean": mean, "transposed": transposed}
            v8, v_scale = quantize(value, **how)
            operands = q8, k8, v8, q_scale, k_scale, v_scale
            found = quantized_attention(*operands, value_transposed=transposed, **options)
            results.append((*found, v_scale))
        assert equal(*results)
        plain = fp8.quantize(value, implementation="xla", **how)
        different = np.asarray(plain[0], np.float32) != np.asarray(v8, np.float32)
        assert different.sum() <= max(4, different.size / 1000)
