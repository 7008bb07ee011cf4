"""The Hadamard transform against NumPy, and its signs."""

import fp8_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa3 import fp8

H = 64


pytestmark = pytest.mark.usefixtures("on_cpu")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 256])
def test_hadamard_transform(head_dim):
    q, k = normal(5, 2, head_dim), normal(5, 2, head_dim, seed=1)
    signs = fp8.random_signs(7, head_dim)
    found = fp8.hadamard_transform(q, signs)
    np.testing.assert_allclose(found, fp8_oracle.transformed(q, signs), atol=2e-6)
    plain = fp8.hadamard_transform(q)
    np.testing.assert_allclose(plain, fp8_oracle.transformed(q), atol=2e-6)
    np.testing.assert_allclose((found**2).sum(-1), (q**2).sum(-1), rtol=1e-5)
    products = (found * fp8.hadamard_transform(k, signs)).sum(-1)
    np.testing.assert_allclose(products, (q * k).sum(-1), atol=2e-5)
    narrow = fp8.hadamard_transform(jnp.asarray(q, jnp.bfloat16), np.asarray(signs, np.int32))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), found, rtol=0.02, atol=0.02)


def test_hadamard_transform_is_linear_and_spreads_outliers():
    def function(x):
        return fp8.hadamard_transform(x, fp8.random_signs(0, H))

    x = np.zeros(H, np.float32)
    x[5] = 8
    np.testing.assert_allclose(jnp.abs(function(x)), 1, rtol=1e-6)
    matrix = jax.jacrev(function)(x)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(H), atol=1e-6)


def test_random_signs():
    first = np.asarray(fp8.random_signs(0, 256))
    assert first.dtype == np.float32 and set(first) == {-1, 1} and 90 < (first > 0).sum() < 166
    # Keys that were transformed once, and kept, are read by every later version.
    assert "".join("-+"[int(x > 0)] for x in first[:24]) == "-+++-------+-+-+--++++--"
    np.testing.assert_array_equal(fp8.random_signs(np.int64(0), 64), first[:64])
    assert (first != fp8.random_signs(1, 256)).any()
    keys = jax.random.key(3), jax.random.PRNGKey(3)
    drawn = [jax.jit(fp8.random_signs, static_argnums=1)(key, 96) for key in keys]
    assert drawn[0].shape == (96,) and set(np.asarray(drawn[0])) == {-1, 1}
    np.testing.assert_array_equal(*drawn)
    for wrong in (-1, 0.5, True, None, "0", jnp.zeros(2), jax.random.split(keys[0]), np.zeros(())):
        with pytest.raises(ValueError, match="key: got"):
            fp8.random_signs(wrong, 64)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("head_dim", [0, 1, 8, 24, 40, 72, 100])
def test_head_dims_without_a_transform(head_dim):
    with pytest.raises(ValueError, match=f"x: got head dim {head_dim}, .* a multiple of 16"):
        fp8.hadamard_transform(jnp.zeros((2, head_dim)))


def test_hadamard_transform_of_what_is_not_floating():
    with pytest.raises(ValueError, match=r"x: got int32\[64\], wanted \[..., H\] of a floating"):
        fp8.hadamard_transform(jnp.zeros(64, jnp.int32))
