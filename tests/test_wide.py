"""Heads wider than 256: who runs a call and its gradient, and what is refused."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import hide_gpus, lower, targets

import jax_fa3
from jax_fa3 import _dispatch, kv_cache

FWD, BWD = "jax_fa3.fwd.v1", "jax_fa3.bwd.v1"
DIMS = pytest.mark.parametrize("dims", [(512, 512), (576, 512), (64, 512), (264, 8)], ids=str)


def shapes(head_dim: int, head_dim_v: int, length: int = 16) -> list[jax.ShapeDtypeStruct]:
    dims = (4, head_dim), (2, head_dim), (2, head_dim_v)
    return [jax.ShapeDtypeStruct((2, length, *x), jnp.bfloat16) for x in dims]


def attention(*qkv: Any, implementation: Any = "fa3", **options: Any) -> Any:
    return jax_fa3.dot_product_attention(*qkv, implementation=implementation, **options)


def gradient(implementation: Any) -> Any:
    def loss(*qkv: Any) -> Any:
        return attention(*qkv, implementation=implementation).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1, 2))


@pytest.fixture(autouse=True)
def _without_gpus(monkeypatch):
    hide_gpus(monkeypatch)


@DIMS
def test_forward(dims):
    assert targets(lower(attention, *shapes(*dims))) == [FWD]
    assert jax_fa3.is_supported(*shapes(*dims), device="sm_90") is None


@pytest.mark.parametrize("dims", [(512, 512), (64, 512), (264, 8), (8, 264)], ids=str)
def test_gradient(dims):
    for implementation in ("fa3", None):
        assert targets(lower(gradient(implementation), *shapes(*dims))) == [FWD, BWD]


def test_gradient_is_refused():
    message = (
        r"implementation='fa3': query: got a gradient at head dims \(520, 512\), "
        r"wanted at most 512 there, or use implementation='xla'"
    )
    with pytest.raises(NotImplementedError, match=message):
        lower(gradient("fa3"), *shapes(520, 512))


def test_gradient_under_none(monkeypatch):
    """XLA's, behind the kernel's forward; on a Hopper GPU with a warning that says why."""
    assert targets(lower(gradient(None), *shapes(576, 512))) == [FWD]
    monkeypatch.setattr(_dispatch, "compute_capabilities", lambda: {"9.0"})
    monkeypatch.setattr(_dispatch, "machine_refusal", lambda: None)
    with pytest.warns(UserWarning, match="on XLA. query: got a gradient at head dims"):
        lower(gradient(None), *shapes(576, 320))  # traced anew


def test_gradient_on_cpu():
    """As with "xla"."""
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in shapes(512, 512)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradient(None)(*qkv)
    for x, y in zip(*map(jax.tree.leaves, (found, gradient("xla")(*qkv))), strict=True):
        np.testing.assert_allclose(jnp.float32(x), jnp.float32(y), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dims", [(584, 512), (8, 520)], ids=str)
def test_beyond_all_kernels(dims):
    reason = jax_fa3.is_supported(*shapes(*dims), device="sm_90") or ""
    assert (
        f"got head dims ({dims[0]}, {dims[1]}) in bfloat16, wanted at most one of those" in reason
    )


def test_too_many_keys():
    """Sums over more would drift."""
    assert jax_fa3.is_supported(*shapes(512, 512, 2**18), device="sm_90") is None
    reason = jax_fa3.is_supported(*shapes(512, 512, 2**18 + 1), device="sm_90") or ""
    assert reason.startswith("key: got 262145 keys of head dims (512, 512), wanted at most 262144")
    assert jax_fa3.is_supported(*shapes(256, 256, 2**18 + 1), device="sm_90") is None


def test_no_decoding():
    query = jax.ShapeDtypeStruct((2, 1, 4, 512), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((2, 64, 2, 512), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)

    def decode(query: Any, cache: Any, lengths: Any) -> Any:
        return kv_cache.dot_product_attention(query, cache, cache, lengths, implementation="fa3")

    with pytest.raises(NotImplementedError, match=r"query: got head dims \(512, 512\)"):
        jax.eval_shape(decode, query, cache, lengths)
