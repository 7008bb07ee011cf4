"""Wrong custom calls on a GPU: none may reach a kernel, which would take the GPU context with it.
Many more, on a CPU: test_boundary."""

import re

import numpy as np
import pytest
from right_calls import right_calls, without_heads
from wrong_calls import REFUSED, outcome, wrong_calls, wrong_throughout

pytestmark = pytest.mark.gpu
CALLS = right_calls()


@pytest.mark.parametrize(
    "name",
    [
        "fwd",
        "fwd joined",
        "bwd",
        "bwd continued",
        "bwd packed",
        "fp8",
        "quantize",
        "segment_intervals",
    ],
)
def test_one_thing_wrong(hopper, name):
    call = CALLS[name]
    first = np.asarray(call.run(hopper)[0])
    found = {what: outcome(wrong, hopper) for what, wrong in wrong_calls(call)}
    assert {x: y for x, y in found.items() if not re.match(REFUSED, y)} == {}
    assert sum("jax_fa3: " in message for message in found.values()) >= 20
    np.testing.assert_array_equal(np.asarray(call.run(hopper)[0]), first)


def test_wrong_throughout(hopper):
    found = {what: outcome(call, hopper) for what, call in wrong_throughout()}
    assert {x: y for x, y in found.items() if "INVALID_ARGUMENT: jax_fa3: " not in y} == {}
    for call in CALLS.values():
        call.run(hopper)


@pytest.mark.parametrize("name", without_heads())
def test_no_query_heads(hopper, name):
    """Nothing is computed; the gradients of keys and values that nobody reads are 0."""
    call = without_heads()[name]
    grads = {"bwd": 3, "bwd packed": 1}.get(name, 0)
    assert all(not np.asarray(x, np.float32).any() for x in call.run(hopper)[:grads])
