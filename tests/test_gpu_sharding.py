"""2 and 4 Hopper GPUs: the forward bit by bit as on one, gradients by the tolerance rule."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from cases import Case
from helpers import Results, equal
from jax.sharding import NamedSharding
from masks import documents
from meshes import AUTO, EXPLICIT, arrays, assert_right, attend, make_mesh, put, run, specs

pytestmark = pytest.mark.gpu

IDS = np.stack([documents(300, 212, 1, 511), documents(1024)] * 2)
MASK = {"is_causal": True, "query_segment_ids": IDS, "key_value_segment_ids": IDS}
MHA, GQA, MQA = (Case(f"K = {k}", 1024, 1024, 8, k, 128, B=4, mask=MASK) for k in (8, 4, 1))

# Axes of 2 and 4 GPUs; what batch, query heads and key/value heads are split over; how many devices
# share a key/value head.
LAYOUTS: dict[str, tuple[Case, dict[str, int], tuple[Any, Any, Any], int]] = {
    "batch over 2": (GQA, {"x": 2}, ("x", None, None), 1),
    "heads over 2": (GQA, {"x": 2}, (None, "x", "x"), 1),
    "batch over 4": (MQA, {"x": 4}, ("x", None, None), 1),
    "heads over 4": (MHA, {"x": 4}, (None, "x", "x"), 1),
    "both, 2 x 2": (GQA, {"x": 2, "y": 2}, ("x", "y", "y"), 1),
    "one key head, 2 x 2": (MQA, {"x": 2, "y": 2}, ("x", "y", None), 2),
}


@functools.cache
def alone(case: Case) -> Results:
    """On one GPU."""
    return jax.jit(attend(case, implementation="fa3"))(*arrays(case))


@pytest.mark.parametrize("kind", ["automatic", "argument", "explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_on_one_gpu(hopper, kind, layout):
    case, axes, split, sharers = LAYOUTS[layout]
    count = int(np.prod([*axes.values()]))
    if len(jax.local_devices(backend="cuda")) < count:
        pytest.skip(f"needs {count} GPUs")
    mesh = make_mesh(EXPLICIT if kind == "explicit" else AUTO, platform="cuda", **axes)
    operands = arrays(case)
    where = specs(*split, operands[3])
    options: dict[str, Any] = {"implementation": "fa3"}
    if kind == "argument":
        options["sharding"] = NamedSharding(mesh, where[0])
    results, exchanged = run(attend(case, **options), *put(mesh, operands, where))
    found = jax.tree.map(np.asarray, results)
    assert exchanged <= ({"all-reduce", "all-gather"} if sharers > 1 else set())
    assert equal(found[:2], alone(case)[:2])  # a head is computed alike wherever that happens
    assert_right(found, case, sharers)
