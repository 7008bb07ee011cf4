"""FP8 attention of values that have a mean, over few and many keys, on a Hopper GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

import jax_fa3
from jax_fa3 import fp8

pytestmark = pytest.mark.gpu

attention = functools.partial(fp8.dot_product_attention, implementation="fa3")
exact = functools.partial(jax_fa3.dot_product_attention, implementation="fa3")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def drawn(keys: int, head_dim: int, equal: bool) -> tuple[Array, ...]:
    """query, key and value, the weights being equal or those of normal logits; values are 1 + 0.3 N."""
    lengths = zip(jax.random.split(jax.random.key(keys), 3), (192, keys, keys), strict=True)
    q, k, v = (jax.random.normal(x, (1, n, 2, head_dim)) for x, n in lengths)
    arrays = q * (not equal), k, 1 + 0.3 * v
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays)
    return q, k, v


def found_over_true(found: Array, true: Array) -> float:
    return float(jnp.sum(found.astype(jnp.float32)) / jnp.sum(true.astype(jnp.float32)))


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("keys", [512, 4096, 65536, 131072])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "normal"])
def test_values_with_a_mean(keys: int, head_dim: int, equal: bool):
    qkv = drawn(keys, head_dim, equal)
    assert abs(found_over_true(attention(*qkv), exact(*qkv)) - 1) < 2e-3
    x8, scales = zip(*(fp8.quantize(x) for x in qkv), strict=True)
    call: Any = fp8.quantized_dot_product_attention
    found = call(*x8, *scales, dtype=jnp.float32, implementation="fa3")

    def dequantized(x: Array, scale: Array) -> Array:
        rows = jnp.repeat(scale, fp8.BLOCK, axis=1)[:, : x.shape[1], :, None]
        return (x.astype(jnp.float32) * rows).astype(jnp.bfloat16)

    true = exact(*map(dequantized, x8, scales))
    assert abs(found_over_true(found, true) - 1) < 5e-3


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_means_cost_nothing(head_dim: int):
    """Of values, and constant channels of keys: as large an error as without."""
    q, k, v = drawn(8192, head_dim, False)
    v = ((v.astype(jnp.float32) - 1) / 0.3).astype(jnp.bfloat16)

    def error(key: Array, value: Array) -> float:
        wanted = exact(q, key, value).astype(jnp.float32)
        return float(jnp.sqrt(jnp.mean((attention(q, key, value) - wanted) ** 2)))

    plain = error(k, v)
    assert error(k, v + 1) < 1.2 * plain + 2**-10  # and bf16's rounding of 1
    assert error(k.at[..., ::32].add(20), v) < 1.5 * plain


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("keys", [3, 30, 1000])
def test_log_sum_exp(keys: int, head_dim: int):
    """Up to head dim 128 that of the weights as they are rounded, each by at most a sixteenth and on average
    by nothing, so some way from that of the weights; else of the weights (docs/fp8.md)."""
    qkv = drawn(keys, head_dim, False)
    x8, scales = zip(*(fp8.quantize(x) for x in qkv), strict=True)
    found, wanted = (
        fp8.quantized_dot_product_attention(*x8, *scales, implementation=x, return_residual=True)[1]
        for x in ("fa3", "xla")
    )
    error = found - wanted
    assert jnp.abs(error).max() < (0.06 if head_dim <= 128 else 2e-3)
    size = jnp.sqrt(jnp.mean(error**2))
    if head_dim <= 128:
        assert {3: 4e-3, 30: 2.5e-3, 1000: 7e-4}[keys] < size < 0.012
    else:
        assert size < 5e-4
    assert jnp.abs(error.mean()) < 2e-3
