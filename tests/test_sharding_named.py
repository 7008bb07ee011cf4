"""Explicit mesh axes, and the same said by the argument sharding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Results
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, operations, targets
from meshes import (
    AUTO,
    EXPLICIT,
    GATHERS_NESTED,
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

# jax 0.12.0.1 gathers at a shard_map over explicit axes inside one over automatic ones, for a sine too.
GATHERS_INSIDE_MANUAL = GATHERS_NESTED or jax.__version_info__ >= (0, 12)
LINE, PLANE, CUBE = {"x": 8}, {"x": 2, "y": 4}, {"x": 2, "y": 2, "z": 2}


pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize(
    ("axes", "batch", "heads", "case", "sharers"),
    [
        (LINE, None, "x", MHA, 1),
        (CUBE, "x", ("z", "y"), GQA, 1),
        (PLANE, "x", "y", PAIR, 2),
    ],
)
def test_batch_and_heads(kind, axes, batch, heads, case, sharers):
    """By type, or by argument on automatic axes: no collective but the sum of shared gradients."""
    operands = arrays(case)
    mesh = make_mesh(kind, **axes)
    where = specs(batch, heads, heads if sharers == 1 else None, operands[3])
    options = {"sharding": NamedSharding(mesh, where[0])} if kind is AUTO else {}
    found, exchanged = run(attend(case, **options), *put(mesh, operands, where))
    assert_right(found, case, sharers)
    assert exchanged == (set() if sharers == 1 else {"all-reduce"})
    if kind is EXPLICIT:
        types = [jax.typeof(x).sharding.spec for x in found]
        padded = [P(*spec, *[None] * (4 - len(spec))) for spec in (where[0], *where[:3])]
        assert [types[0], *types[2:]] == padded


def test_types_that_differ():
    """Replicated operands follow those that are split; two ways to split do not go together."""
    operands = arrays(GQA)
    mesh = make_mesh(EXPLICIT, x=2, y=4)
    where = specs("x", "y", "y", operands[3])
    for replicated in (0, 1, 2):
        mixed = [P() if i == replicated else s for i, s in enumerate(where)]
        found, _ = run(attend(GQA), *put(mesh, operands, (*mixed[:3], *where[3:])))
        assert_right(found, GQA)
        assert jax.typeof(found[2 + replicated]).sharding.spec == P(*[None] * 4)
    wrong = "sharding: got batch entries split over .'x',. and .'y',., wanted the same"
    with pytest.raises(ValueError, match=wrong):
        run(attend(GQA), *put(mesh, operands, (where[0], P("y"), *where[2:])))
    wrong = "query heads split over .'y',., key/value heads over .'x',."
    with pytest.raises(ValueError, match=wrong):
        first, key = P(None, None, "y"), P(None, None, "x")
        call = jax_fa3.dot_product_attention
        run(lambda *x: call(*x), *put(mesh, operands[:3], (first, key, key)))


def test_sequence_is_gathered_with_a_warning():
    operands = arrays(GQA)
    mesh = make_mesh(EXPLICIT, x=2, y=4)
    where = specs("x", None, None, operands[3])
    query = P("x", "y")  # and the cotangents have the types of what comes back
    with pytest.warns(UserWarning, match="split over .'y',.; .*jax_fa3.context_parallel"):
        found, _ = run(attend(GQA), *put(mesh, operands, (query, *where[1:4], (query, query))))
    assert_right(found, GQA)


def test_xla_with_dense_arguments():
    """They are split as well, where they are not broadcast."""
    q, k, v, *_ = arrays(small(4, mask={}))
    bias, mask = jnp.ones((8, 8, 24, 24), q.dtype), jnp.tril(jnp.ones((24, 24), bool))
    call = jax_fa3.dot_product_attention
    mesh = make_mesh(EXPLICIT, x=2, y=4)
    where = *[P("x", None, "y")] * 3, P("x", "y"), P(), P()
    operands = q, k, v, bias, mask, jnp.float32(0.3)

    def loss(q, k, v, bias, mask, scale):
        out = call(q, k, v, bias, mask, scale=scale, implementation="xla")
        return jnp.sin(out.astype(jnp.float32)).sum()

    grads = jax.value_and_grad(loss, (0, 1, 2, 3))
    found, exchanged = run(grads, *put(mesh, operands, where))
    assert "all-gather" not in exchanged
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(grads(*operands)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("check_vma", [True, False])
def test_manual_outside_and_explicit_inside(check_vma):
    operands = arrays(GQA)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AUTO, EXPLICIT))
    where = specs("x", None, None, operands[3])
    out = Results(where[0], P("x"), *where[:3])  # pyright: ignore[reportArgumentType]
    options: Any = {"mesh": mesh, "axis_names": {"x"}, "check_vma": check_vma}
    mapped = jax.shard_map(attend(GQA), in_specs=where, out_specs=out, **options)
    found, exchanged = run(mapped, *put(mesh, operands, specs("x", "y", "y", operands[3])))
    assert_right(found, GQA)
    assert not exchanged or GATHERS_INSIDE_MANUAL


def test_explicit_and_automatic_axes():
    operands = arrays(GQA)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(EXPLICIT, AUTO))
    split = put(mesh, operands, specs("x", None, None, operands[3]))

    def function(q, *others):
        q = jax.lax.with_sharding_constraint(q, NamedSharding(mesh, P(None, None, "y")))
        return attend(GQA)(q, *others)

    with pytest.raises(NotImplementedError, match="pass sharding=, or use jax.set_mesh"):
        run(function, *split)
    with jax.set_mesh(mesh):
        found, _ = run(function, *split)
    assert_right(found, GQA)
    sharding = NamedSharding(mesh, P("x", None, "y"))
    found, _ = run(attend(GQA, sharding=sharding), *split)
    assert_right(found, GQA)


def test_vmap_over_a_split_axis():
    operands = jax.tree.map(lambda x: jnp.stack([x, x]), arrays(GQA))
    mesh = make_mesh(EXPLICIT, x=2, y=2, z=2)
    where = specs("x", "z", "z", operands[3])
    where = jax.tree.map(lambda spec: P("y", *spec), where)
    found, exchanged = run(jax.vmap(attend(GQA)), *put(mesh, operands, where))
    assert not exchanged or GATHERS_NESTED
    assert jax.typeof(found.out).sharding.spec == P("y", "x", None, "z", None)
    for i in range(2):
        assert_right(jax.tree.map(lambda x, i=i: np.asarray(x)[i], found), GQA)


def test_key_intervals_keep_their_type():
    mesh = make_mesh(EXPLICIT, x=8)
    ids = jax.device_put(arrays(GQA)[3]["query_segment_ids"], NamedSharding(mesh, P("x")))

    def function(ids):
        segments = {"query_segment_ids": ids, "key_value_segment_ids": ids}
        return jax_fa3.key_intervals(24, 24, is_causal=True, **segments)

    found, exchanged = run(function, ids)
    assert not exchanged
    for x, y in zip(found, function(jnp.asarray(np.asarray(ids))), strict=True):
        np.testing.assert_array_equal(x, y)
        assert jax.typeof(x).sharding.spec == P("x", None)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_program_for_cuda(kind):
    """The kernels themselves, on local sizes, and no collective."""
    mesh = make_mesh(kind, x=2, y=4)
    where = NamedSharding(mesh, P("x", None, "y"))
    x = jax.ShapeDtypeStruct((8, 64, 8, 64), jnp.bfloat16, sharding=where)
    sharding = where if kind is AUTO else None

    def loss(q, k, v):
        return jax_fa3.dot_product_attention(q, k, v, sharding=sharding).astype(jnp.float32)

    def function(q, k, v, cotangent):
        out, pullback = jax.vjp(loss, q, k, v)
        return out, pullback(cotangent)

    text = lower(function, x, x, x, jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=where))
    assert targets(text)[0] == "jax_fa3.fwd.v1"
    rows = "tensor<4x2x64xf32>"
    assert f"-> (tensor<4x64x2x64xbf16>, {rows}, {rows}, tensor<1xi32>, tensor<0xf32>)" in text
    assert "CustomSPMDPartitioning" not in text
    assert not [name for name in operations(text) if name.startswith(("all_", "collective"))]
