"""What is taken out of keys and values before they are quantized, on a machine without a GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from helpers import assert_close
from masks import documents, packed

import jax_fa3
from jax_fa3 import fp8

pytestmark = pytest.mark.usefixtures("on_cpu")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("length", [1, 7, 255, 1000, 70000])
def test_token_mean(length):
    """Near the mean where there is one, 0 where there is none, but in one column of 160 by chance; what is
    not finite, lies past the length or is far from all else does not count."""
    x = normal(1, length, 2, 256) + np.where(np.arange(256) < 4, 3, 0)
    found = np.asarray(fp8.token_mean(x))
    assert found.shape == (1, 2, 256) and found.dtype == np.float32
    if length == 1:
        np.testing.assert_allclose(found, x[:, 0], rtol=1e-6)
    if length > 200:
        # About 4.5 standard deviations, of 256 and of 64 rows.
        limit = 0.4 if length > 8000 else 0.7
        assert (np.abs(found[..., :4] - 3) < limit).all()
        assert np.count_nonzero(found[..., 4:]) <= 10 and np.abs(found[..., 4:]).max() < limit
        planted = np.concatenate([x, np.full((1, 300, 2, 256), np.nan, np.float32)], 1)
        planted[:, 5:20] = np.nan
        planted[:, length - length // 8 : length] = 1e30
        again = np.asarray(fp8.token_mean(planted, lengths=[length]))
        assert (np.abs(again[..., :4] - 3) < 1.25 * limit).all()
        assert (
            np.count_nonzero(again[..., 4:]) <= 10 and np.abs(again[..., 4:]).max() < 1.25 * limit
        )
    assert not np.asarray(fp8.token_mean(x, lengths=[0])).any()
    assert not np.asarray(fp8.token_mean(x[:, :0])).any()
    np.testing.assert_array_equal(fp8.token_mean(x[0]), found[0])


def test_token_mean_of_any_length():
    """A program exported for any length takes as many rows as the call of that length."""
    shape = jax.export.symbolic_shape("b, t, 2, 64")
    exported = jax.export.export(jax.jit(fp8.token_mean))(jax.ShapeDtypeStruct(shape, jnp.float32))
    for length in (1, 300, 2047, 4100, 9000):
        x = normal(1, length, 2, 64) + 1
        np.testing.assert_allclose(exported.call(x), fp8.token_mean(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_means_cost_nothing(head_dim):
    """Values with means, and keys with constant channels: the error is that of the same without, and
    several times as large where nothing is taken out."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in rng.standard_normal((3, 1, 600, 2, head_dim)))
    key = k.at[..., :3].add(20)

    def error(key: Any, value: Any, **options: Any) -> float:
        exact = jax_fa3.dot_product_attention(q, key, value)
        return float(
            jnp.sqrt(((fp8.dot_product_attention(q, key, value, **options) - exact) ** 2).mean())
        )

    plain = error(k, v)
    assert error(key, v + 1) < 1.2 * plain
    assert error(k, v + 1, smooth_v=False) > 1.1 * plain
    assert error(key, v, smooth_k=False) > 2 * plain


MASKS: list[dict[str, Any]] = [
    {"is_causal": True},
    {"local_window_size": 40},
    packed(documents(100, 60), documents(100, 60)),
    {"key_value_seq_lengths": [90]},
    {"query_seq_lengths": [90], "key_value_seq_lengths": [0]},
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda x: next(iter(x)))
def test_means_under_masks(mask):
    """Result and log-sum-exp as in 16 bit; rows that see nothing are 0 and -inf; what nobody sees, far
    from all else or NaN, does not show."""
    case = Case("means", 160, 160, 4, 2, 64, B=1, mask=mask)
    q, k, v = case.inputs(jnp.float32)
    k, v = k.at[..., 3].add(20), 1 + 0.3 * v
    hidden = np.zeros(160, bool)
    if "key_value_seq_lengths" in mask:
        hidden[mask["key_value_seq_lengths"][0] :] = True
    k, v = (jnp.where(hidden[:, None, None], x, y) for x, y in ((jnp.nan, k), (1e30, v)))
    out, lse = fp8.dot_product_attention(q, k, v, return_residual=True, **mask)
    wanted, wanted_lse = jax_fa3.dot_product_attention(q, k, v, return_residual=True, **mask)
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(wanted_lse))
    assert not out[np.isinf(np.asarray(lse))].any()
    assert_close(out, wanted, 0.12)
    assert_close(jnp.nan_to_num(lse, neginf=0), jnp.nan_to_num(wanted_lse, neginf=0), 0.1)


def test_bad_input():
    x = jnp.ones((2, 128, 2, 64))
    x8, scale = fp8.quantize(x)
    attend: Any = fp8.quantized_dot_product_attention
    for name, value in (("smooth_k", True), ("smooth_v", False)):
        wanted = rf"{name}: got {value}, wanted nothing: jax_fa3.fp8.quantize\(mean=\)"
        with pytest.raises(ValueError, match=wanted):
            attend(x8, x8, x8, scale, scale, scale, **{name: value})
    with pytest.raises(
        ValueError, match=r"value_mean: got float32\[2, 64\], wanted float32\[2, 2,"
    ):
        attend(x8, x8, x8, scale, scale, scale, value_mean=jnp.ones((2, 64)))
    with pytest.raises(ValueError, match="x: got dtype int32, wanted a floating dtype"):
        fp8.token_mean(np.zeros((2, 3, 4, 64), np.int32))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 64\), wanted"):
        fp8.token_mean(x[:, 0, 0])
