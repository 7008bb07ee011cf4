"""Several batch axes, split over devices."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_axes import RNG, H, K, N, S, T, grads, normal
from helpers import assert_close
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3

MORE: dict[str, Any] = {
    "key_value_seq_lengths": jnp.asarray([[7, 3, 2, 5], [1, 7, 6, 4]]),
    "mask": jnp.asarray(RNG.random((2, 1, 1, T, S)) < 0.7),
    "sinks": normal(N),
}


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit, "argument"], ids=str)
@pytest.mark.parametrize("axes", [("x",), (None, "x"), ("x", "y"), ("y", None, None, "x")], ids=str)
def test_over_devices(axes: Any, kind: Any, dropped: bool):
    """Each axis by itself, with no collective; dropout is the same however they are split."""
    options: Any = {"dropout_rate": 0.3, "dropout_key": jax.random.key(1)} if dropped else {}
    arrays = normal(2, 4, T, N, H), normal(2, 4, S, K, H), normal(2, 4, S, K, H)
    cotangents = normal(2, 4, T, N, H), normal(2, 4, T, N)
    bias = normal(1, 4, N, T, S)

    def call(arrays: Any, cotangents: Any, bias: Array, more: Any, **options: Any) -> Any:
        return grads(cotangents, *arrays, bias, names=["bias"], **more, **options)

    wanted = jax.jit(functools.partial(call, **options))(arrays, cotangents, bias, MORE)
    kinds = (AxisType.Explicit if kind == AxisType.Explicit else AxisType.Auto,) * 2
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"), axis_types=kinds)
    where = NamedSharding(mesh, P(*axes))
    if kind == "argument":
        options["sharding"] = where
    with jax.set_mesh(mesh):
        put: Any = jax.tree.map(lambda x: jax.device_put(x, where), (arrays, cotangents[0]))
        of_lse = jax.device_put(cotangents[1], NamedSharding(mesh, P(*axes)))
        function = jax.jit(functools.partial(call, **options))
        given = put[0], (put[1], of_lse), bias, MORE
        if kind == AxisType.Explicit:
            assert jax.typeof(put[0][0]).sharding.spec[: len(axes)] == axes
        found = function(*given)
        assert_close(found, wanted, 1e-4)
        if kind == AxisType.Explicit:
            (out, _), (dq, *_) = found
            assert [*out.sharding.spec][: len(axes)] == [*axes] == [*dq.sharding.spec][: len(axes)]


def test_known_lengths_beyond_int32():
    """Each device has its own entries' alone."""
    arrays = normal(2, 4, T, N, H), normal(2, 4, S, K, H), normal(2, 4, S, K, H)
    lengths = np.array([[2**40, 3, -(2**40), 5], [1, 7, 6, 4]])
    call = functools.partial(jax_fa3.dot_product_attention, key_value_seq_lengths=lengths)
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    where = NamedSharding(mesh, P("x", "y"))
    with jax.set_mesh(mesh):
        assert_close(jax.jit(call)(*jax.device_put(arrays, where)), call(*arrays), 1e-5)


@pytest.mark.parametrize("axes", [("x",), (None, "x"), ("x", "y")], ids=str)
def test_named_axes_need_no_collective(axes: Any):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    where = NamedSharding(mesh, P(*axes))
    shapes = (2, 4, T, N, H), (2, 4, S, N, H), (2, 4, S, N, H)
    call = functools.partial(jax_fa3.dot_product_attention, sharding=where, is_causal=True)
    given = [jax.ShapeDtypeStruct(x, jnp.float32, sharding=where) for x in shapes]
    text = jax.jit(call).lower(*given).compile().as_text() or ""
    assert not re.search(r" (all-|collective-)[\w-]+\(", text)
