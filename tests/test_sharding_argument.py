"""The argument sharding, and own_kv_heads for a shard_map of the user's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Results
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    AUTO,
    GQA,
    MHA,
    PAIR,
    arrays,
    assert_right,
    attend,
    make_mesh,
    put,
    run,
    small,
    specs,
)

import jax_fa3

pytestmark = pytest.mark.usefixtures("on_cpu")


def test_argument_takes_the_mesh_of_the_context():
    operands = arrays(GQA)
    mesh = make_mesh(AUTO, x=2, y=4)
    with jax.set_mesh(mesh):
        split = put(mesh, operands, specs("x", "y", "y", operands[3]))
        found, exchanged = run(attend(GQA, sharding=P("x", None, "y")), *split)
    assert_right(found, GQA)
    assert not exchanged


def test_argument_without_a_batch_axis():
    q, k, v, *_ = arrays(small(4, mask={}))
    where = NamedSharding(make_mesh(AUTO, x=4), P(None, "x"))
    call = jax_fa3.dot_product_attention
    split = [jax.device_put(x[0], where) for x in (q, k, v)]
    found, exchanged = run(lambda *x: call(*x, sharding=where), *split)
    np.testing.assert_allclose(found, call(q, k, v)[0], atol=2e-3)
    assert not exchanged


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        (P("w"), r"sharding: got axis 'w', wanted one of \['x', 'y'\]"),
        (P(("x", "y")), r"axes \('x', 'y'\) of size 8 for 4 batch entries"),
        (P(None, None, ("x", "y")), r"axes \('x', 'y'\) of size 8 for 6 query heads"),
        (P(None, "x"), "wanted batch and heads alone; .*jax_fa3.context_parallel"),
        (P(None, None, None, None, "x"), "at most 4 entries"),
        (P("x", None, "x"), "axis 'x' for batch and heads, wanted one use of each axis"),
        ("x", "wanted a jax.sharding.NamedSharding or PartitionSpec"),
    ],
)
def test_wrong_arguments(sharding, message):
    x = jnp.zeros((4, 2, 6, 8), jnp.float16)
    with jax.set_mesh(make_mesh(AUTO, x=2, y=4)), pytest.raises(ValueError, match=message):
        jax_fa3.dot_product_attention(x, x, x, sharding=sharding)


def test_arguments_without_the_right_mesh():
    x = jnp.zeros((4, 2, 12, 8), jnp.float16)
    call = jax_fa3.dot_product_attention
    with pytest.raises(ValueError, match="wanted a NamedSharding, for there is no jax.set_mesh"):
        call(x, x, x, sharding=P("x"))
    mesh = make_mesh(AUTO, x=2)
    other = NamedSharding(make_mesh(AUTO, x=4), P("x"))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="mesh {'x': 4}, wanted this one"):
        call(x, x, x, sharding=other)

    def local(x):
        return call(x, x, x, sharding=P("x"))

    with pytest.raises(ValueError, match="axis 'x', wanted one of .*not manual yet"):
        jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x"))(x)


def test_heads_and_axis_that_have_nothing_to_do_with_each_other():
    q, k = (jnp.zeros((4, 2, n, 8), jnp.float16) for n in (12, 3))
    sharding = NamedSharding(make_mesh(AUTO, x=2), P(None, None, "x"))
    message = r"axes \('x',\) for 12 query and 3 key/value heads, sizes \[2\], wanted"
    with pytest.raises(ValueError, match=message):
        jax_fa3.dot_product_attention(q, k, k, sharding=sharding)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("case", "sharers"), [(PAIR, 2), (MHA, 1)])
def test_own_kv_heads(check_vma, case, sharers):
    """In the user's shard_map, with key and value replicated over the axis of the query heads."""
    operands = arrays(case)
    mesh = make_mesh(AUTO, x=2, y=4)
    where = specs("x", "y", None, operands[3])

    def local(q, k, v, masks):
        k, v = (jax_fa3.own_kv_heads(x, "y") for x in (k, v))
        call = jax_fa3.dot_product_attention
        return call(q, k, v, **masks, is_causal=True, return_residual=True)

    def function(q, k, v, masks, cotangents):
        options: Any = {"mesh": mesh, "out_specs": where[4], "check_vma": check_vma}
        mapped: Any = jax.shard_map(local, in_specs=where[:4], **options)
        (out, lse), pullback = jax.vjp(lambda *qkv: mapped(*qkv, masks), q, k, v)
        return Results(out, lse, *pullback(cotangents))

    found, exchanged = run(function, *put(mesh, operands, where))
    assert_right(found, case, sharers)
    assert exchanged == {"all-reduce"}


def test_own_kv_heads_that_do_not_divide():
    def local(x):
        return jax_fa3.own_kv_heads(x, "x")

    mapped = jax.shard_map(local, mesh=make_mesh(AUTO, x=4), in_specs=P(), out_specs=P("x"))
    with pytest.raises(ValueError, match="axis_name: got 'x' of size 4, wanted .* the 6 key/value"):
        mapped(jnp.zeros((2, 6, 8)))
