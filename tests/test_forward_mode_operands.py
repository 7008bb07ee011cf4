"""Tangents beside every operand, without a GPU: the same as those of implementation="xla", which are
compared with finite differences."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tangent_operands import CASE, NAMES, WAYS, assert_near, both, pushed_operands

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_as_plain_jax(name: str, way: str):
    assert_near(*both(CASE, name, way, jnp.float16, None), 0.01)


@pytest.mark.parametrize("name", NAMES)
def test_finite_differences(name: str):
    """In fp64; dropout's weights do not depend on what moves."""
    with jax.enable_x64(True):
        attention, primals, tangents = pushed_operands(CASE, name, jnp.float64)
        primals, along = (tuple(x.astype(jnp.float64) for x in y) for y in (primals, tangents))
        function: Any = functools.partial(attention, None)
        step = 1e-5
        ahead, behind = (
            function(*(x + sign * step * t for x, t in zip(primals, along, strict=True)))
            for sign in (1, -1)
        )
        _, found = jax.jvp(function, primals, along)
        for x, y, z in zip(found, ahead, behind, strict=True):
            seen = np.isfinite(y)
            np.testing.assert_allclose(x[seen], ((y - z) / (2 * step))[seen], atol=2e-7)
