"""On explicit axes results have query's type and gradients that of their operand, also where a sequence
or head dim is gathered for the call."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Results
from jax.sharding import PartitionSpec as P
from meshes import (
    AUTO,
    EXPLICIT,
    GQA,
    arrays,
    assert_right,
    attend,
    make_mesh,
    put,
    run,
    small,
)

import jax_fa3
from jax_fa3 import fp8

PLANE: Any = {"x": 2, "y": 4}
GATHERS = "jax_fa3 gathers a sequence or head dim that is split over"

pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings(f"ignore:{GATHERS}"),
]


def entries(spec: Any, rank: int = 4) -> P:
    return P(*spec[:rank], *[None] * (rank - len(spec)))


def type_of(x: Any) -> P:
    return jax.typeof(x).sharding.spec


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize(
    ("query", "key"),
    [
        (P("x", "y"), P("x")),
        (P(None, "y"), P()),
        (P(None, ("x", "y")), P()),
        (P(None, "x", "y"), P(None, None, "y")),
        (P(None, "x", "y"), P(None, "x")),  # heads follow query, the sequences of keys are gathered
        (P("x", None, None, "y"), P("x")),
        (P(None, "x", None, "y"), P()),
        (P(None, "x"), P("x")),  # one axis for both: it stays where query has it
    ],
)
def test_a_sequence_or_head_dim_that_is_split(implementation, query, key):
    """Numbers, types, cotangents of query's type, and a residual sum."""
    mesh, operands = make_mesh(EXPLICIT, **PLANE), arrays(GQA)
    batch = P("x") if "x" in (query[0], key and key[0]) else P()
    where = query, key, key, {name: batch for name in operands[3]}, (query, entries(query, 3))

    def function(q: Any, *others: Any) -> tuple[Results, Any]:
        results = attend(GQA, implementation=implementation)(q, *others)
        return results, q + results.out

    (found, total), exchanged = run(function, *put(mesh, operands, where))
    assert_right(found, GQA)
    wanted = [entries(query), entries(query, 3), entries(query), entries(key), entries(key)]
    assert [*map(type_of, found), type_of(total)] == [*wanted, entries(query)]
    assert exchanged


def test_what_query_does_not_split_follows_the_others():
    """Batch by key, the sequence by query: the sum has both."""
    mesh, (q, k, v, *_) = make_mesh(EXPLICIT, **PLANE), arrays(small(4, mask={}))
    call = jax_fa3.dot_product_attention
    split = put(mesh, (q, k, v), (P(None, "y"), P("x"), P("x")))
    found, _ = run(lambda q, k, v: q + call(q, k, v), *split)
    assert type_of(found) == P("x", "y", None, None)
    np.testing.assert_allclose(np.asarray(found, np.float32), q + call(q, k, v), atol=4e-3)


def test_another_head_dim_of_value():
    """Its results have nothing to do with query's head dim, their sequence has."""
    case = small(4, mask={}, V=24)
    mesh, (q, k, v, *_) = make_mesh(EXPLICIT, **PLANE), arrays(case)
    call = functools.partial(jax_fa3.dot_product_attention, return_residual=True)
    split = put(mesh, (q, k, v), (P(None, "x", None, "y"), P(), P()))
    (out, lse), _ = run(call, *split)
    assert [type_of(out), type_of(lse)] == [P(None, "x", None, None), P(None, "x", None)]
    for x, y in zip((out, lse), call(q, k, v), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-3)


@pytest.mark.parametrize("spec", [P("x", "y"), P(None, "x", None, None, "y")])
@pytest.mark.parametrize("num_kv_heads", [None, 4])
def test_packed(num_kv_heads, spec):
    q, k, v, *_ = arrays(small(8 if num_kv_heads is None else 4, mask={}))
    if num_kv_heads is None:
        qkv = jnp.stack([q, k, v], 2)
    else:
        qkv, spec = jnp.concatenate([q, k, v], 2), P(*(spec[i] for i in (0, 1, 2, 4)[: len(spec)]))
    mesh = make_mesh(EXPLICIT, **PLANE)
    call = functools.partial(jax_fa3.qkv_dot_product_attention, num_kv_heads=num_kv_heads)

    def function(qkv: Any) -> Any:
        out, pullback = jax.vjp(call, qkv)
        return out, *pullback(out)

    (out, grad), _ = run(function, put(mesh, qkv, spec))
    assert type_of(out) == P(*spec[:2], None, spec[-1] if len(spec) > 3 else None)
    assert type_of(grad) == entries(spec, qkv.ndim)
    for x, y in zip((out, grad), function(qkv), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_inside_manual_axes_and_under_vmap(implementation):
    """One explicit axis is all there is, and splits only what must be whole."""
    q, k, v, *_ = arrays(small(4, mask={}))
    call = functools.partial(jax_fa3.dot_product_attention, implementation=implementation)

    def layer(q: Any, k: Any, v: Any) -> Any:
        out = call(q, k, v)
        assert type_of(out) == type_of(q)
        return q + out

    exact = jax.jit(layer)(q, k, v)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AUTO, EXPLICIT))
    options: Any = {"mesh": mesh, "axis_names": {"x"}, "in_specs": P("x"), "out_specs": P("x")}
    split = put(mesh, (q, k, v), (P("x", "y"), P("x"), P("x")))
    found, _ = run(jax.shard_map(layer, **options), *split)
    np.testing.assert_allclose(np.asarray(found), exact, atol=2e-3)

    stacked = jnp.stack([q, q])
    mesh = make_mesh(EXPLICIT, x=2, y=4)
    split = put(mesh, (stacked, k, v), (P("x", None, "y"), P(), P()))
    found, _ = run(jax.vmap(layer, (0, None, None)), *split)
    assert type_of(found) == P("x", None, "y", None, None)
    np.testing.assert_allclose(np.asarray(found), jnp.stack([exact, exact]), atol=2e-3)


def test_fp8():
    q, k, v, *_ = arrays(small(4, mask={}))
    split = put(make_mesh(EXPLICIT, **PLANE), (q, k, v), (P("x", "y"), P("x"), P("x")))

    def function(q: Any, k: Any, v: Any) -> Any:
        tensors, scales = zip(*map(fp8.quantize, (q, k, v)), strict=True)
        quantized = fp8.quantized_dot_product_attention(*tensors, *scales, dtype=q.dtype)
        return q + fp8.dot_product_attention(q, k, v), q + quantized

    found, _ = run(function, *split)
    assert [*map(type_of, found)] == [P("x", "y", None, None)] * 2
    for x, y in zip(found, function(q, k, v), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-2)
