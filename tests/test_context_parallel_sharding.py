"""The argument sharding: arrays that lie otherwise are moved, whatever kind of axes the mesh has."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AUTO, EXPLICIT, make_mesh

import jax_fa3
from jax_fa3 import context_parallel

pytestmark = pytest.mark.usefixtures("on_cpu")

AXES: Any = {"data": 2, "sp": 2, "model": 2}
SPEC = P("data", "sp", "model")
KINDS = {
    "automatic": (AUTO,) * 3,
    "explicit": (EXPLICIT,) * 3,
    "both": (EXPLICIT, AUTO, EXPLICIT),
}


def inputs() -> tuple[Any, ...]:
    """query, key and value, of mean 1 and scale 3; segment ids and offsets."""
    keys = jax.random.split(jax.random.key(0), 3)
    tensors = (
        3 * jax.random.normal(k, (4, 8, n, 16)) + 1 for k, n in zip(keys, (4, 2, 2), strict=True)
    )
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (4, 8)), axis=1), jnp.int32)
    return *tensors, ids, jnp.arange(4, dtype=jnp.int32)


def value_and_grads(call: Any, *arrays: Any) -> Any:
    def function(*tensors: Any) -> Any:
        *_, ids, offsets = arrays
        masks = {"query_segment_ids": ids, "key_value_segment_ids": ids, "query_offset": offsets}
        return call(*tensors, is_causal=True, **masks)

    out, pullback = jax.vjp(function, *arrays[:3])
    return out, *pullback(jnp.sin(out))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("strategy", "spec"),
    [
        *itertools.product(["ring", "all_gather", "all_to_all"], [None, P(), SPEC]),
        ("ring", P("data", None, "model")),
        ("ring", P("model", "sp")),
    ],
)
def test_arrays_that_lie_otherwise(kind, strategy, spec):
    """Operands and masks alike; None: on no mesh. Gradients have their operand's type."""
    mesh = make_mesh(AUTO, **AXES)
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=KINDS[kind])
    arrays = inputs()
    exact = value_and_grads(jax_fa3.dot_product_attention, *arrays)
    if spec is not None:
        where = [NamedSharding(mesh, P(*spec[: x.ndim])) for x in arrays]
        arrays = jax.device_put(arrays, tuple(where))
    options = {"axis_name": "sp", "strategy": strategy, "sharding": NamedSharding(mesh, SPEC)}
    call = functools.partial(context_parallel.dot_product_attention, **options)
    found = jax.jit(functools.partial(value_and_grads, call))(*arrays)
    for x, y in zip(found, exact, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    if kind == "explicit" and spec is not None:
        specs = [jax.typeof(x).sharding.spec for x in found]
        assert specs == [P(*SPEC, None)] + [jax.typeof(x).sharding.spec for x in arrays[:3]]


INNER: Any = {"data": 1, "sp": 2}


@pytest.mark.parametrize("around", [EXPLICIT, "data"], ids=str)
def test_the_mesh_of_the_context(around):
    """It knows of which kind its axes are here: of jax.set_mesh, or in a shard_map over some of them."""
    mesh = make_mesh(AUTO, **INNER)
    arrays = inputs()
    exact = value_and_grads(jax_fa3.dot_product_attention, *arrays)
    spec = P("data", "sp") if around == EXPLICIT else P(P.UNCONSTRAINED, "sp")
    options = {"axis_name": "sp", "sharding": NamedSharding(mesh, spec)}
    call: Any = functools.partial(context_parallel.dot_product_attention, **options)
    found: Any = jax.jit(functools.partial(value_and_grads, call))
    if around == "data":
        found = jax.shard_map(
            found, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
        )
        mesh = make_mesh(AUTO, **INNER)
    else:
        mesh = make_mesh(EXPLICIT, **INNER)
    with jax.set_mesh(mesh):
        for x, y in zip(jax.jit(found)(*arrays), exact, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_a_context_that_does_not_fit():
    def call(x: Any) -> Any:
        return context_parallel.dot_product_attention(x, x, x, axis_name="sp", sharding=sharding)

    sharding = NamedSharding(make_mesh(AUTO, **INNER), P("data", "sp"))
    x = jnp.ones((1, 8, 2, 8))
    for axis, spec in (("sp", P(None, "sp")), ("data", P("data"))):
        mesh = sharding.mesh
        local = jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={axis})
        with pytest.raises(ValueError, match=f"sharding: got axis '{axis}', wanted one of"):
            jax.eval_shape(local, x)
    wanted = r"sharding: got mesh {'data': 1, 'sp': 2}, wanted this one: {'sp': 2}"
    with jax.set_mesh(make_mesh(AUTO, sp=2)), pytest.raises(ValueError, match=wanted):
        jax.eval_shape(call, x)
