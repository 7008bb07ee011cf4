"""The backward of head dims 192 and (192, 128) on a Hopper GPU: a part of the table, whose cases have
other head dims, and other lengths around its tiles of 96 keys."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CAUSAL, TABLE, Case
from helpers import assert_rounded, both_oracles, poison, with_gradients
from long_cases import LONG

import jax_fa3

pytestmark = pytest.mark.gpu

LENGTHS = [(1, 97), (63, 96), (65, 95), (128, 193), (200, 191), (300, 289)]
CASES = [
    *(dataclasses.replace(case, H=192) for case in TABLE[::3]),
    *(dataclasses.replace(case, H=192) for case in LONG[::2]),
    *(Case(f"{t}x{s}", t, s, 4, 2, 192, mask=CAUSAL if s < t else {}) for t, s in LENGTHS),
]
oracles = jax.jit(both_oracles, static_argnums=(0, 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_table(case: Case, dtype: Any):
    """Each dtype with the value head dim that the other has not, by turns."""
    index = CASES.index(case)
    case = dataclasses.replace(case, V=(128, 192)[(index + (dtype == jnp.float16)) % 2])
    inputs, cotangents = case.inputs(dtype), case.cotangents(dtype)
    poison(case, dtype)
    call = functools.partial(
        jax_fa3.dot_product_attention,
        implementation="fa3",
        return_residual=True,
        deterministic_backward=index % 4 < 2,
        **case.arguments,
    )
    found = jax.jit(functools.partial(with_gradients, call))(cotangents, *inputs)
    exact, rounded = oracles(case, dtype, inputs, cotangents)
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)
