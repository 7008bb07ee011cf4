"""JAX's modes on a Hopper GPU, with the kernels: eager calls give what they give without the mode."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest
from calls import PLAIN, around, tensors
from helpers import assert_close
from modes import EVERY, compiled_in_third_call, debug, results, strict

pytestmark = pytest.mark.gpu


@functools.cache
def usual(name: str) -> Any:
    with around(name):
        return results(name, "fa3", *tensors())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("mode", [jax.disable_jit, debug, strict])
def test_modes(mode: Callable[[], Any], name: str):
    """Within one unit in the last place of bfloat16: the order of sums in dq may differ."""
    wanted = usual(name)
    with around(name), mode():
        found = results(name, "fa3", *tensors())
    assert_close(found, wanted, 2**-7)


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"ring in shard_map"}))
def test_eager_calls_compile_once(name: str):
    with around(name):
        for implementation in ("xla",) if name in PLAIN else ("xla", "fa3"):
            call = functools.partial(EVERY[name], implementation, *tensors())
            assert compiled_in_third_call(call) == 0, implementation
