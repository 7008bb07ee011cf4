"""How many CTAs share the keys of a tile in the forward, and the workspace for it."""

import jax
import jax.numpy as jnp
import pytest

from jax_fa3 import _ffi, _plan
from jax_fa3._operands import Operands
from jax_fa3._problem import Config, Masks, Sizes

C = pytest.importorskip("jax_fa3._C", reason="Python-only install", exc_type=ModuleNotFoundError)
HIGH = 2**31 - 1
pytestmark = pytest.mark.skipif(
    not {64, 128, 256} <= {h for _, h, _ in C.kernels()},
    reason="kernels were left out of this build",
)


def splits(batch: int, T: int, S: int, heads: int, head_dim: int) -> int:
    return C.fwd_splits((batch, T, S, heads, heads, head_dim, head_dim))


@pytest.mark.parametrize("head_dim", [64, 72, 128, 192, 256])
def test_full_gpu(head_dim: int):
    """Where tiles fill the GPU evenly, or there is a block of keys or none."""
    assert splits(8, 2048, 2048, 2048 // head_dim, head_dim) == 1
    assert splits(HIGH, HIGH, 2**18, 1, head_dim) == 1
    assert splits(1, 64, 64, 1, head_dim) == splits(1, 64, 0, 1, head_dim) == 1
    assert splits(0, 64, 2**14, 1, head_dim) == splits(1, 0, 2**14, 1, head_dim) == 1


def test_few_rows():
    assert splits(8, 512, 16384, 8, 64) == 2  # 192 tiles on 132 SMs
    assert splits(1, 512, 16384, 8, 64) >= 5  # 24
    assert splits(1, 1, 2**18, 1, 64) == 32
    assert splits(1, 1, 2**18 + 1, 1, 64) == 1  # sums in parts have that workspace
    assert splits(1, 1, 2**14, 1, 264) == splits(1, 1, 2**14, 1, 584) == 1


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_no_more_than_fill_the_gpu(head_dim: int):
    """No CTA is without a block, and workspace is bounded."""
    for T in (1, 100, 1000, 5000):
        for S in (100, 1000, 10000, 100000):
            found = splits(1, T, S, 4, head_dim)
            assert found == 1 or found <= -(-S // C.tile(head_dim, head_dim, False)[1])
            assert found == 1 or found * -(-T // 192) * 4 <= 8 * 132


def test_workspace():
    """Parts of O and two numbers of each row, where nothing restricts or adds anything."""
    sizes = Sizes(8, 512, 16384, 8, 8, 64, 64)
    assert _plan.fwd_workspace(C, sizes, is_plain=True)["long_sums"].shape == (2, 64 * 512 * 66)
    assert _plan.fwd_workspace(C, sizes, is_plain=False)["long_sums"].shape == (0,)
    assert _plan.fwd_workspace(None, sizes, is_plain=True)["long_sums"].shape == (0,)


def test_masked_calls_are_not_shared():
    query = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 8192, 2, 64), jnp.bfloat16)
    ends = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    plain = Config(1.0, (None, None), None, False)
    window = Config(1.0, (100, None), None, False)

    def text(config: Config, end: jax.ShapeDtypeStruct | None) -> str:
        def forward(*x: jax.Array):
            return _ffi.fwd(config, Operands(*x[:3]), Masks(key_end=x[3] if end else None))

        traced = jax.jit(forward).trace(query, key, key, *([end] if end else []))
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    assert "x16896xf32>" in text(plain, None)
    assert "x16896xf32>" not in text(plain, ends)
    assert "x16896xf32>" not in text(window, None)
