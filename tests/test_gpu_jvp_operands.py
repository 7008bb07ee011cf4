"""Tangents beside every operand on a Hopper GPU: by the kernel, or by XLA behind the kernel of the forward;
against the oracle by the rule of tolerance, and in every mode as plain JAX has them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import Case
from helpers import Results, assert_rounded, poison
from jax import Array, lax
from tangent_operands import NAMES, WAYS, assert_near, both, pushed_operands

from jax_fa3 import _reference

pytestmark = pytest.mark.gpu

CASE = Case("operands", 200, 260, 4, 2, 64)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_as_plain_jax(name: str, way: str):
    poison(CASE, jnp.bfloat16)
    assert_near(*both(CASE, name, way, jnp.bfloat16, "fa3"), 0.02)


def has_forward(name: str, head_dim: int) -> bool:
    """Dense operands, and terms of the scores, stop at 128."""
    return head_dim <= 128 or not any(x in name for x in ("bias", "alibi", "several"))


TOLERANCES = [(x, h) for x in NAMES for h in (64, 128, 256, 512) if has_forward(x, h)]


@pytest.mark.parametrize(("name", "head_dim"), [x for x in TOLERANCES if "dropout" not in x[0]])
def test_tolerance(name: str, head_dim: int):
    """All that moves at once."""
    case = dataclasses.replace(CASE, H=head_dim)
    attention, primals, tangents = pushed_operands(case, name, jnp.bfloat16)
    found = jax.jit(functools.partial(jax.jvp, functools.partial(attention, "fa3")))
    results = Results(*found(primals, tangents)[1])
    wide = tuple(tuple(x.astype(jnp.float32) for x in y) for y in (primals, tangents))

    def along(round_to: Any) -> Results:
        def function(*arrays: Array) -> tuple[Array, Array]:
            options = attention.options(arrays[3:])
            return _reference.attention(*arrays[:3], **options, round_to=round_to)

        with jax.default_matmul_precision("highest"):
            return Results(*jax.jit(functools.partial(jax.jvp, function))(*wide)[1])

    exact, rounded = along(None), along(jnp.bfloat16)
    narrow = lax.optimization_barrier(rounded.out.astype(jnp.bfloat16)).astype(jnp.float32)
    eps = jnp.finfo(jnp.bfloat16).eps
    assert_rounded(results, exact, rounded._replace(out=narrow), case, eps)


@pytest.mark.parametrize("head_dim", [256, 512])
def test_rows_of_several_intervals(head_dim: int):
    """Of a kernel that takes one in each row: NaN in the output, and in its tangent."""
    case = dataclasses.replace(CASE, H=head_dim)
    attention, primals, tangents = pushed_operands(case, "mask, several", jnp.bfloat16)
    assert all(
        jnp.isnan(x).all()
        for pair in jax.jvp(functools.partial(attention, "fa3"), primals, tangents)
        for x in pair
    )
