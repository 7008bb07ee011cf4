"""relative_bias: its term and its gradient, here in plain JAX; what the
kernels are given. As of every term of the scores: test_score_terms; on a GPU: test_gpu_relative_bias."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, Case
from distances import assert_table, table_of
from helpers import assert_close, reference
from jax import Array
from lowering import lower, targets
from score_terms import attention, grads
from test_ffi import needs_kernels

import jax_fa3
from jax_fa3 import _targets

B, T, S, N, K, H = 2, 10, 12, 4, 2, 8
CASE = Case("distance", T, S, N, K, H, B=B, mask=CAUSAL)
NAME = "relative_bias"


def inputs(farthest: int = 3) -> tuple[Array, ...]:
    return *CASE.inputs(jnp.float32), table_of(CASE, farthest)


@pytest.mark.parametrize("farthest", [0, 3, 9, 40])
@pytest.mark.parametrize(
    "offset", [0, 3, -20, 2**40, jnp.int32(2), np.array([1, -3]), np.array([2**40, -(2**40)])]
)
def test_results_and_gradients(farthest: int, offset: Any):
    """Distances are from the row's position, as masks have it."""
    arrays, cotangents = inputs(farthest), CASE.cotangents(jnp.float32)
    options: Any = {"is_causal": False, "query_offset": offset}
    found = grads(NAME, attention, cotangents, *arrays, **options)
    options["query_offset"] = np.clip(offset, -(10**6), 10**6)
    assert_close(found, grads(NAME, reference, cotangents, *arrays, **options), 1e-4)


def test_a_table_that_says_the_same_as_slopes():
    *tensors, slopes = *CASE.inputs(jnp.float32), jnp.asarray((0.5, 0.25, -0.1, 0.02))
    table = slopes[:, None] * jnp.arange(-S, S + 1)
    wanted = attention(*tensors, alibi_slopes=slopes, is_causal=True)
    assert_close(attention(*tensors, relative_bias=table, is_causal=True), wanted, 1e-5)


def test_what_the_gpu_tests_allow():
    """An exact gradient passes, one with a wrong entry does not."""
    arrays, cotangents = inputs(), CASE.cotangents(jnp.float32)
    _, (*_, found) = grads(NAME, reference, cotangents, *arrays, sinks=None)
    assert_table(found, CASE, arrays, cotangents)
    with pytest.raises(AssertionError):
        assert_table(found.at[1, 2].multiply(1.01), CASE, arrays, cotangents)


def test_export_of_symbolic_lengths():
    length, keys = jax.export.symbolic_shape("t, s")
    q, k = (jax.ShapeDtypeStruct((B, n, N, H), jnp.float32) for n in (length, keys))
    *tensors, table = inputs()

    def call(q: Array, k: Array, v: Array, table: Array) -> Array:
        return jax_fa3.dot_product_attention(
            q, k, v, relative_bias=table, query_offset=2, implementation="xla"
        )

    shapes = q, k, k, jax.ShapeDtypeStruct(table.shape, table.dtype)
    exported = jax.export.export(jax.jit(call))(*shapes)
    q, k, v = (x.repeat(N // x.shape[2], 2) for x in tensors)
    assert_close(exported.call(q, k, v, table), call(q, k, v, table), 1e-6)


def bucket_of(distance: int, count: int, farthest: int, bidirectional: bool) -> int:
    """Of T5, in integers: the greatest i with (farthest / exact)^i <= (away / exact)^steps."""
    each = count // 2 if bidirectional else count
    first = each if bidirectional and distance > 0 else 0
    away, exact = abs(distance) if bidirectional else max(-distance, 0), each // 2
    if away < exact:
        return first + away
    steps = each - exact
    left = away**steps
    found = max(i for i in range(steps + 1) if farthest**i * exact ** (steps - i) <= left)
    return first + min(exact + found, each - 1)


@pytest.mark.parametrize("count, farthest", [(32, 128), (32, 20), (12, 100), (64, 800)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_of_t5(count: int, farthest: int, bidirectional: bool):
    x = jnp.arange(2.0 * count).reshape(2, count)

    def make(x: Array) -> Array:
        return jax_fa3.t5_relative_bias(x, max_distance=farthest, bidirectional=bidirectional)

    buckets = [bucket_of(d, count, farthest, bidirectional) for d in range(-farthest, farthest + 1)]
    assert np.array_equal(make(x), x[:, np.array(buckets)])
    (gradient,) = jax.vjp(make, x)[1](jnp.ones((2, len(buckets))))
    assert np.array_equal(gradient, [np.bincount(buckets, minlength=count)] * 2)


def test_refused_beside_slopes():
    q = jax.ShapeDtypeStruct((B, T, N, 64), jnp.bfloat16)
    table, slopes = (jax.ShapeDtypeStruct(x, jnp.float32) for x in ((N, 7), (N,)))
    options: Any = {"relative_bias": table, "alibi_slopes": slopes, "device": "sm_90"}
    reason = jax_fa3.is_supported(q, q, q, **options) or ""
    assert "relative_bias: got some beside alibi_slopes" in reason


@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (2, 0), (2,), (1, 2, 5)])
def test_wrong_tables(shape: tuple[int, ...]):
    q = jnp.zeros((1, 16, 2, 8))
    with pytest.raises(ValueError, match=r"relative_bias: got shape .*, wanted \(2, 2 \* max \+ 1"):
        jax_fa3.dot_product_attention(q, q, q, relative_bias=jnp.ones(shape))
    with pytest.raises(ValueError, match="relative_bias: got dtype int32"):
        jax_fa3.dot_product_attention(q, q, q, relative_bias=jnp.ones((2, 3), jnp.int32))


def test_wrong_buckets():
    for shape, options in [((2, 3), {}), ((2, 32), {"max_distance": 8}), ((32,), {})]:
        with pytest.raises(ValueError, match="buckets: got "):
            jax_fa3.t5_relative_bias(jnp.ones(shape), **options)


@needs_kernels
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_kernels_take_it(learned: bool, deterministic: bool):
    """Nothing has T x S elements. A gradient that nobody wants is not computed."""
    q, k = (jax.ShapeDtypeStruct((B, n, N, 64), jnp.bfloat16) for n in (300, 301))
    table = jax.ShapeDtypeStruct((N, 65), jnp.float32)
    options: Any = {"implementation": "fa3", "deterministic_backward": deterministic}

    def one(q: Array, k: Array, v: Array, table: Array) -> Array:
        out = jax_fa3.dot_product_attention(q, k, v, relative_bias=table, **options)
        return out.astype(jnp.float32).sum()

    text = lower(jax.grad(one, (0, 1, 2, 3) if learned else (0, 1, 2)), q, k, k, table)
    assert targets(text) == [_targets.FWD, _targets.BWD]
    assert "300x301" not in text and f"tensor<1x{N}x2x1116xf32>" in text
    parts = 3 * 8 if deterministic else 1
    assert (f"tensor<{B}x{N}x{parts}x1116xf32>" in text) == learned
    assert jax_fa3.is_supported(q, k, k, relative_bias=table, device="sm_90") is None


@needs_kernels
def test_a_dense_mask_beside_it_becomes_intervals():
    q = jax.ShapeDtypeStruct((B, T, N, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((B, 1, T, T), jnp.bool_)

    def call(q: Array, mask: Array) -> Array:
        options: Any = {"relative_bias": jnp.ones((N, 3)), "implementation": "fa3"}
        return jax_fa3.dot_product_attention(q, q, q, mask=mask, **options)

    assert targets(lower(call, q, mask)) == [_targets.FWD]
