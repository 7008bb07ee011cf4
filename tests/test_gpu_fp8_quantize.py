"""The quantization kernel on a Hopper GPU, against the same in plain JAX."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa3 import fp8

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])


def assert_quantized_alike(found: Any, exact: Any, ulps: int) -> None:
    """Scales to so many units in the last place; of the numbers, all but one in a thousand the same,
    and those off by one e4m3 step: ties, and what fp32 sums in another order."""
    (x8, scales), (exact8, exact_scales) = jax.tree.map(np.asarray, (found, exact))
    np.testing.assert_array_equal(np.isnan(scales), np.isnan(exact_scales))
    finite = ~np.isnan(scales)
    np.testing.assert_array_max_ulp(scales[finite], exact_scales[finite], ulps)
    x, y = x8.astype(np.float32), exact8.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
    np.testing.assert_allclose(x, y, rtol=0.13, atol=2**-9)
    different = (x != y) & ~np.isnan(x)
    assert different.sum() <= max(4, x.size / 1000)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000])
def test_quantize(head_dim: int, dtype: Any, length: int):
    """The kernel as the same in plain JAX: magnitudes that spread, padding with NaN, a bad block."""
    rng = np.random.default_rng(length)
    shape = 3, length, 5, head_dim
    x = rng.standard_normal(shape, np.float32)
    x *= np.logspace(-2, 2, length, dtype=np.float32)[:, None, None]
    x[0, :, 4] = 0
    x[2, length // 2, 1, 7] = np.inf
    lengths = np.array([length, length // 2, length], np.int32)
    x[1, lengths[1] :] = np.nan
    narrow = jnp.asarray(x, dtype)
    for signs in (None, fp8.random_signs(1, head_dim)):
        for counts in (lengths, None):
            call = functools.partial(fp8.quantize, lengths=counts, signs=signs)
            found, exact = (call(narrow, implementation=how) for how in ("fa3", "xla"))
            assert_quantized_alike(found, exact, 1 if signs is None else 8)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_quantize_without_a_mean(head_dim: int, dtype: Any):
    rng = np.random.default_rng(head_dim)
    x = jnp.asarray(rng.standard_normal((2, 300, 3, head_dim)) + np.arange(head_dim) / 8, dtype)
    lengths = np.array([300, 130], np.int32)
    x = x.at[1, 130:].set(jnp.nan)
    mean = fp8.token_mean(x, lengths=lengths)
    for signs in (None, fp8.random_signs(1, head_dim)):
        call = functools.partial(fp8.quantize, lengths=lengths, signs=signs, mean=mean)
        found, exact = (call(x, implementation=how) for how in ("fa3", "xla"))
        assert_quantized_alike(found, exact, 1 if signs is None else 8)


@DTYPES
def test_quantize_extremes(dtype: Any):
    """The greatest, the smallest and subnormal numbers of the dtype."""
    info = jnp.finfo(dtype)
    sizes = [float(info.max), float(info.tiny), float(info.tiny) / 8]
    rng = np.random.default_rng(0)
    x = np.concatenate([s * rng.uniform(-1, 1, (1, 128, 2, 64)) for s in sizes], axis=1)
    narrow = jnp.asarray(x.clip(-sizes[0], sizes[0]), dtype)
    found, exact = (fp8.quantize(narrow, implementation=how) for how in ("fa3", "xla"))
    # What is subnormal in fp32 the kernel flushes to 0, and XLA may.
    keep = 1 if dtype == jnp.bfloat16 else 3
    rows = keep * 128
    assert_quantized_alike(
        (found[0][:, :rows], found[1][:, :keep]), (exact[0][:, :rows], exact[1][:, :keep]), 1
    )
    assert np.isfinite(np.asarray(found[0], np.float32)).all() and (found[1] > 0).all()
