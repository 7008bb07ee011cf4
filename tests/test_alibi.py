"""alibi_slopes: their term, here in plain JAX; what the kernels are given. As of every term of the
scores: test_score_terms; on a GPU: test_gpu_alibi."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CAUSAL, Case
from helpers import assert_close, reference
from jax import Array
from lowering import lower, targets
from score_terms import attention
from test_ffi import needs_kernels

import jax_fa3
from jax_fa3 import _targets

B, T, S, N, K, H = 2, 10, 12, 4, 2, 8
CASE = Case("alibi", T, S, N, K, H, B=B, mask=CAUSAL)
SLOPES = (0.5, 0.25, -0.1, 0.02)


def inputs() -> tuple[Array, ...]:
    return *CASE.inputs(jnp.float32), jnp.asarray(SLOPES)


def test_results():
    q, k, v, slopes = inputs()
    causal: dict[str, Any] = CAUSAL
    wanted = reference(q, k, v, alibi_slopes=slopes, **causal)
    assert_close(attention(q, k, v, alibi_slopes=slopes, **causal), wanted, 1e-5)
    # A row's own position changes the log-sum-exp alone.
    bias = slopes[:, None, None] * jnp.arange(S)
    same, _ = attention(q, k, v, bias[None], **causal)
    assert_close(same, wanted[0], 1e-5)


def test_wrong_ones():
    q = jnp.zeros((1, 16, 2, 8))
    with pytest.raises(ValueError, match=r"alibi_slopes: got shape \(3,\), wanted \(2,\)"):
        jax_fa3.dot_product_attention(q, q, q, alibi_slopes=jnp.ones(3))
    with pytest.raises(ValueError, match="alibi_slopes: got dtype int32"):
        jax_fa3.dot_product_attention(q, q, q, alibi_slopes=jnp.ones(2, jnp.int32))


@needs_kernels
@pytest.mark.parametrize("learned", [False, True])
def test_kernels_take_them(learned: bool):
    """From positions: nothing has T x S elements. A gradient that nobody wants is not computed."""
    q, k = (jax.ShapeDtypeStruct((B, n, N, 64), jnp.bfloat16) for n in (300, 301))
    slopes = jax.ShapeDtypeStruct((N,), jnp.float32)

    def one(q: Array, k: Array, v: Array, slopes: Array) -> Array:
        out = jax_fa3.dot_product_attention(q, k, v, alibi_slopes=slopes, implementation="fa3")
        return out.astype(jnp.float32).sum()

    text = lower(jax.grad(one, (0, 1, 2, 3) if learned else (0, 1, 2)), q, k, k, slopes)
    assert targets(text) == [_targets.FWD, _targets.BWD]
    assert "300x301" not in text
    assert (f"tensor<{B}x{N}x{3 * 256}xf32>" in text) == learned
    assert jax_fa3.is_supported(q, k, k, alibi_slopes=slopes, device="sm_90") is None


@needs_kernels
def test_a_dense_mask_beside_them_becomes_intervals():
    q = jax.ShapeDtypeStruct((B, T, N, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((B, 1, T, T), jnp.bool_)

    def call(q: Array, mask: Array) -> Array:
        options: Any = {"alibi_slopes": jnp.asarray(SLOPES), "implementation": "fa3"}
        return jax_fa3.dot_product_attention(q, q, q, mask=mask, **options)

    assert targets(lower(call, q, mask)) == [_targets.FWD]
