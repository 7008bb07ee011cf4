"""relative_bias on a Hopper GPU: what is its alone. As of every term: test_gpu_score_terms."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from biases import LONG, with_gradients
from cases import CAUSAL, Case
from distances import table_of
from helpers import equal
from score_terms import check, kernels

import jax_fa3

pytestmark = pytest.mark.gpu

NAME = "relative_bias"
CASES = [
    Case("planted, full", 300, 384, B=3, H=64, mask=LONG, planted=True),
    Case("offset", 77, 300, H=64, mask={**CAUSAL, "query_offset": 223}),
    Case("offsets", 77, 300, H=128, mask={**CAUSAL, "query_offset": np.array([223, 5])}),
    Case("one key", 300, 1, H=128),
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.H}")
def test_table(case: Case, dtype: Any):
    check(NAME, case, (*case.inputs(dtype), table_of(case, 150)))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("farthest", [0, 7, 128, 1000])
def test_any_table(farthest: int, head_dim: int):
    case = Case("tables", 260, 600, 4, 2, H=head_dim)
    check(NAME, case, (*case.inputs(jnp.bfloat16), table_of(case, farthest, 4.0)))


FAR = [(2.5, -2.5), (200.0, -200.0), (-1e4, 1e4), (-1e30, 3.0)]


@pytest.mark.parametrize("mask", [{}, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("far", FAR, ids=str)
def test_far_from_the_diagonal(far: tuple[float, float], head_dim: int, mask: Any):
    """Where whole blocks have one entry, which may be too large to be left out of their scores."""
    case = Case("far", 650, 700, 4, 2, H=head_dim, mask=mask)
    table = table_of(case, 40).at[:, 0].set(far[0]).at[:, -1].set(far[1])
    check(NAME, case, (*case.inputs(jnp.bfloat16), table.at[0].set(1.5)))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_deterministic(head_dim: int):
    case = Case("deterministic", 700, 513, 8, 2, H=head_dim, B=3, mask=CAUSAL)
    arrays = *case.inputs(jnp.bfloat16), table_of(case, 200)
    first = check(NAME, case, arrays, deterministic_backward=True)
    call = functools.partial(with_gradients, kernels(NAME, case, deterministic_backward=True))
    for _ in range(3):
        assert equal(jax.jit(call)(case.cotangents(jnp.bfloat16), *arrays), first)


def test_buckets_of_t5():
    case = Case("t5", 400, 400, 4, 4, H=64, scale=1.0)
    arrays, cotangents = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    buckets = jnp.asarray(np.random.default_rng(0).standard_normal((4, 32)), jnp.float32)

    def call(q: Any, k: Any, v: Any, buckets: Any) -> Any:
        table = jax_fa3.t5_relative_bias(buckets)
        return kernels(NAME, case, deterministic_backward=True)(q, k, v, table)

    found = jax.jit(functools.partial(with_gradients, call))(cotangents, *arrays, buckets)
    table, pullback = jax.vjp(jax_fa3.t5_relative_bias, buckets)
    by_distance = check(NAME, case, (*arrays, table), deterministic_backward=True).dbias
    (wanted,) = pullback(by_distance)
    scale = np.abs(pullback(jnp.abs(by_distance))[0])
    assert (np.abs(found.dbias - wanted) <= 1e-5 * scale).all()  # the order of sums


def test_a_dense_mask_beside_it():
    case = Case("mask", 200, 260, H=64)
    arrays = *case.inputs(jnp.bfloat16), table_of(case, 60)
    visible = np.tril(np.ones((1, 1, 200, 260), bool))
    call = jax.jit(kernels(NAME, case, mask=visible))
    assert equal(call(*arrays), jax.jit(kernels(NAME, case, is_causal=True))(*arrays))
