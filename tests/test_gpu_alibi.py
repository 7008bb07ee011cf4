"""alibi_slopes on a Hopper GPU: what is theirs alone. As of every term: test_gpu_score_terms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from biases import with_gradients
from cases import CAUSAL, Case
from helpers import equal
from score_terms import check, kernels
from slopes import slopes_of

pytestmark = pytest.mark.gpu

NAME = "alibi_slopes"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("slope", [-0.5, 3.0, 1e-4])
def test_any_slope(slope: float, head_dim: int):
    case = Case("slope", 260, 600, 4, 2, H=head_dim, mask=CAUSAL)
    check(NAME, case, (*case.inputs(jnp.bfloat16), jnp.full(4, slope)))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_of_slopes_are_equal_from_run_to_run(head_dim: int):
    """Those of the slopes always, the others as ever."""
    case = Case("deterministic", 700, 513, 8, 2, H=head_dim, B=3, mask=CAUSAL)
    arrays = *case.inputs(jnp.bfloat16), slopes_of(8)
    first = check(NAME, case, arrays, deterministic_backward=True)
    call = jax.jit(functools.partial(with_gradients, kernels(NAME, case)))
    cotangents = case.cotangents(jnp.bfloat16)
    again, once_more = (call(cotangents, *arrays) for _ in range(2))
    assert equal(again.dbias, once_more.dbias)
    ordered = functools.partial(with_gradients, kernels(NAME, case, deterministic_backward=True))
    assert equal(jax.jit(ordered)(cotangents, *arrays), first)


def test_a_dense_mask_beside_them():
    case = Case("mask", 200, 260, H=64)
    arrays = *case.inputs(jnp.bfloat16), slopes_of(case.N)
    visible = np.tril(np.ones((1, 1, 200, 260), bool), 30)
    call = jax.jit(kernels(NAME, case, mask=visible))
    wanted = jax.jit(kernels(NAME, case, is_causal=True, query_offset=30))
    assert equal(call(*arrays), wanted(*arrays))
