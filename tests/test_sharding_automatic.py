"""Automatic mesh axes: XLA's partitioner splits the call by the rule that comes with it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Results
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, targets
from meshes import (
    AUTO,
    GQA,
    MHA,
    MQA,
    PAIR,
    arrays,
    assert_right,
    attend,
    collectives,
    make_mesh,
    put,
    run,
    small,
    specs,
)

import jax_fa3

pytestmark = pytest.mark.usefixtures("on_cpu")


LINE, PLANE, CUBE = {"x": 8}, {"x": 2, "y": 4}, {"x": 2, "y": 2, "z": 2}


@pytest.mark.parametrize(
    ("axes", "batch", "heads", "case"),
    [
        (LINE, "x", None, MQA),
        (LINE, None, "x", MHA),
        (PLANE, "y", "x", GQA),
        (CUBE, "x", ("z", "y"), GQA),
    ],
)
def test_batch_and_heads(axes, batch, heads, case):
    """Forward and backward without a collective."""
    operands = arrays(case)
    split = put(make_mesh(AUTO, **axes), operands, specs(batch, heads, heads, operands[3]))
    found, exchanged = run(attend(case), *split)
    assert_right(found, case)
    assert not exchanged


@pytest.mark.parametrize(("axes", "heads", "case"), [(PLANE, "y", PAIR), (CUBE, ("x", "y"), MQA)])
def test_wider_than_the_key_value_heads(axes, heads, case):
    """Several devices read one key/value head: nothing is exchanged but gradients."""
    operands = arrays(case)
    split = put(make_mesh(AUTO, **axes), operands, specs(None, heads, None, operands[3]))
    found, exchanged = run(attend(case), *split)
    assert_right(found, case, sharers=4 // case.K)
    assert exchanged <= {"all-reduce", "all-gather"}  # each device wants the whole dk and dv
    forward = run(lambda *x: attend(case)(*x, split[4])[:2], *split[:4])
    assert not forward[1]


def test_sharding_of_the_jit_alone():
    """No array and no type tells of a mesh."""
    operands = arrays(GQA)
    mesh = make_mesh(AUTO, x=2, y=4)
    where = specs("x", "y", "y", operands[3])
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), where)
    compiled = jax.jit(attend(GQA), in_shardings=where).lower(*operands).compile()
    assert_right(compiled(*operands), GQA)
    assert not collectives(compiled)


@pytest.mark.parametrize("key_heads", [2, 3])
def test_heads_that_do_not_divide_are_gathered(key_heads):
    """6 query heads over 4 devices, or 3 key/value heads over 2."""
    case = small(key_heads, N=6)
    operands = arrays(case)
    mesh = make_mesh(AUTO, x=2, y=4)
    query = P("x", None, "y" if key_heads == 2 else None) if key_heads == 2 else P(None, None, "x")
    where = NamedSharding(mesh, query)

    def function(q, *others):
        return attend(case)(jax.lax.with_sharding_constraint(q, where), *others)

    with pytest.warns(UserWarning, match="gathers batch or heads.*pass sharding="):
        found, _ = run(function, *put(mesh, operands, jax.tree.map(lambda _: P(), operands)))
    assert_right(found, case)


def test_uneven_batch():
    """6 entries over 4 devices."""
    case = small(4, B=6)
    case = small(4, B=6, mask={k: v[:6] if k != "is_causal" else v for k, v in case.mask.items()})
    operands = arrays(case)
    mesh = make_mesh(AUTO, x=2, y=4)

    def function(q, *others):
        return attend(case)(
            jax.lax.with_sharding_constraint(q, NamedSharding(mesh, P("y"))), *others
        )

    found, _ = run(function, *put(mesh, operands, jax.tree.map(lambda _: P(), operands)))
    assert_right(found, case)


def test_sequence_is_gathered_with_a_warning():
    operands = arrays(GQA)
    mesh = make_mesh(AUTO, x=2, y=4)
    split = put(mesh, operands, specs("x", None, None, operands[3]))
    query = jax.device_put(operands[0], NamedSharding(mesh, P("x", "y")))
    with pytest.warns(UserWarning, match="gathers a dim.*jax_fa3.context_parallel"):
        found, _ = run(attend(GQA), query, *split[1:])
    assert_right(found, GQA)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("with_context", [True, False])
def test_partly_manual(check_vma, with_context):
    """One axis is manual, heads are split over the other."""
    operands = arrays(GQA)
    mesh = make_mesh(AUTO, x=2, y=4)
    split = put(mesh, operands, specs("x", "y", "y", operands[3]))
    where = specs("x", None, None, operands[3])
    out: Any = where[0], P("x"), *where[:3]
    options = {"mesh": mesh, "axis_names": {"x"}, "check_vma": check_vma}
    mapped = jax.shard_map(attend(GQA), in_specs=where, out_specs=Results(*out), **options)
    if with_context:
        with jax.set_mesh(mesh):
            found, exchanged = run(mapped, *split)
    else:
        found, exchanged = run(mapped, *split)
    assert_right(found, GQA)
    assert not exchanged


def test_partly_manual_and_wider_than_the_key_value_heads():
    """Gathers, for collectives cannot name a part of the devices; the argument is the way out."""
    operands = arrays(PAIR)
    mesh = make_mesh(AUTO, x=2, y=4)
    split = put(mesh, operands, specs("x", "y", None, operands[3]))
    where = specs("x", None, None, operands[3])
    out: Any = where[0], P("x"), *where[:3]
    for sharding in (None, P(None, None, "y")):
        function = attend(PAIR, sharding=sharding)
        options: Any = {
            "mesh": mesh,
            "axis_names": {"x"},
            "in_specs": where,
            "out_specs": Results(*out),
        }
        mapped = jax.shard_map(function, **options)
        if sharding is None:
            with pytest.warns(UserWarning, match="gathers batch or heads"):
                found, _ = run(mapped, *split)
        else:
            found, exchanged = run(mapped, *split)
            assert exchanged == {"all-reduce"}
        assert_right(found, PAIR, sharers=1 if sharding is None else 2)


def test_packed():
    """[B, T, 3, N, H] is split over heads; in [B, T, N + 2K, H] heads are gathered."""
    q, k, v, _, (cotangent, _) = arrays(small(8, mask={"is_causal": True}))
    mesh = make_mesh(AUTO, x=2, y=4)
    cotangent = jax.device_put(cotangent, NamedSharding(mesh, P("x", None, "y")))

    def function(qkv, cotangent, heads=None):
        call = jax_fa3.qkv_dot_product_attention
        out, pullback = jax.vjp(lambda x: call(x, heads, is_causal=True), qkv)
        (grad,) = pullback(cotangent)
        grads = jnp.moveaxis(grad, 2, 0) if heads is None else jnp.split(grad, 3, axis=2)
        return out, *grads

    stacked = jax.device_put(jnp.stack([q, k, v], 2), NamedSharding(mesh, P("x", None, None, "y")))
    split_heads, exchanged = run(function, stacked, cotangent)
    assert not exchanged
    joined = jnp.concatenate([q, k, v], 2)
    where = NamedSharding(mesh, P("x", None, "y"))
    with pytest.warns(UserWarning, match="gathers.*packed qkv"):
        gathered, _ = run(
            lambda *x: function(*x, heads=8), jax.device_put(joined, where), cotangent
        )
    case = small(8, mask={"is_causal": True})
    alone = attend(case)(
        q, k, v, {}, (jax.device_put(cotangent, q.sharding), jnp.zeros((8, 24, 8)))
    )
    for found in (split_heads, gathered):
        assert_right(Results(found[0], alone.lse), case)
        for x, y in zip(found[1:], alone[2:], strict=True):
            np.testing.assert_allclose(x, y, atol=2e-3)


def test_vmap_over_a_split_axis():
    """Nothing is exchanged, whether batch, vmapped axis or both are split."""
    operands = arrays(GQA)
    mesh = make_mesh(AUTO, x=2, y=2, z=2)
    where = specs("x", "z", "z", operands[3])
    where = jax.tree.map(lambda spec: P("y", *spec), where)
    split = put(mesh, jax.tree.map(lambda x: jnp.stack([x, x]), operands), where)
    found, exchanged = run(jax.vmap(attend(GQA)), *split)
    assert not exchanged
    for i in range(2):
        assert_right(jax.tree.map(lambda x, i=i: np.asarray(x)[i], found), GQA)


def test_export_is_refused_with_the_way_out():
    operands = arrays(GQA)
    mesh = make_mesh(AUTO, x=2, y=4)
    split = put(mesh, operands, specs("x", "y", "y", operands[3]))
    with pytest.raises(NotImplementedError, match="automatic mesh axes.*pass sharding="):
        export.export(jax.jit(attend(GQA)))(*split)


@pytest.mark.parametrize(
    ("kv_heads", "rule"),
    [(8, "[i, j, k, l]"), (4, "[i, j, kl, m]"), (1, "[i, j, k, l]")],
)
def test_rule_in_the_program_for_cuda(kv_heads, rule):
    """Heads of a group are the minor part of the query heads; the kernels come at compilation."""
    mesh = make_mesh(AUTO, x=2, y=4)
    where = NamedSharding(mesh, P("x", None, "y" if kv_heads > 1 else None))
    query, key = (
        jax.ShapeDtypeStruct((8, 64, n, 64), jnp.bfloat16, sharding=where) for n in (8, kv_heads)
    )
    text = lower(lambda q, k: jax_fa3.dot_product_attention(q, k, k), query, key)
    assert "@CustomSPMDPartitioning" in text and not targets(text)
    assert f"sdy.op_sharding_rule<({rule}" in text
