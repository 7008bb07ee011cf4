"""_xla under JAX's transformations, and its memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from helpers import temporary_bytes
from jax import Array, export
from masks import documents, ints

import jax_fa3
from jax_fa3 import _xla
from jax_fa3._operands import Operands, Rows
from jax_fa3._problem import Config, Masks

SMALL = Case("small", 20, 26, H=8)
attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="xla", return_residual=True
)


@pytest.mark.parametrize("axis", ["T", "S"])
def test_memory_is_linear(axis: str):
    """Temporaries may double with T or S, and a T x S buffer would show."""

    def temporaries(factor: int) -> list[int]:
        t, s = (2**14 * (factor if axis == x else 1) for x in "TS")
        case = Case("long", t, s, 4, 2, B=1)
        q, k, v, out = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in case.shapes)
        lse = jax.ShapeDtypeStruct((1, 4, case.T), jnp.float32)
        config = Config(0.1, (None, 0), None, False)
        attend = functools.partial(attention, is_causal=True)
        grads = jax.grad(lambda *x: attend(*x)[0].sum(dtype=jnp.float32), (0, 1, 2))

        def backward(q: Any, k: Any, v: Any, out: Any, lse: Any) -> Any:
            return _xla.backward(config, Operands(q, k, v), Masks(), Rows(None, lse, out, lse))

        programs = ((attend, (q, k, v)), (grads, (q, k, v)), (backward, (q, k, v, out, lse)))
        return [temporary_bytes(f, *x) for f, x in programs]

    for once, twice in zip(temporaries(1), temporaries(2), strict=True):
        assert twice < 2.1 * once and twice < 2 * 2**30


def test_vmap_and_remat():
    q, k, v = (x[:, :16, :, :8] for x in SMALL.inputs(jnp.float32))
    lengths = jnp.array([[3, 9], [16, 0], [7, 7]], jnp.int32)

    def loss(q: Array, lengths: Array) -> Array:
        out, _ = attention(q, k[:, :, :, :8], v, key_value_seq_lengths=lengths, is_causal=True)
        return (out**2).sum()

    qs = jnp.stack([q, 2 * q, -q])
    found = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(qs, lengths)
    wanted = jnp.stack([jax.grad(loss)(*x) for x in zip(qs, lengths, strict=True)])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_shard_map():
    """Batch entries on 8 devices, key and value the same for all; both ways to the gradient."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, same = jax.P("data"), jax.P()
    q, k, v = Case("mesh", 20, 26, B=8, H=8).inputs(jnp.float32)
    k, v = k[:1], v[:1]
    config = Config(8**-0.5, (None, 0), None, False)

    def backward(q: Array, k: Array, v: Array) -> Any:
        k, v = (jax.lax.pcast(x, "data", to="varying") for x in (k, v))
        call = config, Operands(q, k, v), Masks()
        out, lse = _xla.attention(*call)
        return _xla.backward(*call, Rows(None, lse, 2 * out, jnp.zeros_like(lse)))

    def autodiff(q: Array, k: Array, v: Array) -> Any:
        return jax.grad(lambda *x: (attention(*x, is_causal=True)[0] ** 2).sum(), (0, 1, 2))(
            q, k, v
        )

    specs = {"mesh": mesh, "in_specs": (data, same, same)}
    once = jax.jit(jax.shard_map(autodiff, **specs, out_specs=(data, same, same)))(q, k, v)
    each = jax.jit(jax.shard_map(backward, **specs, out_specs=(data, data, data)))(q, k, v)
    repeated = (jnp.repeat(x, 8, axis=0) for x in (k, v))
    for x, y, z in zip(once, each, autodiff(q, *repeated), strict=True):
        # Two ways to sum the same terms in fp32, of magnitude 10 before they cancel.
        np.testing.assert_allclose(y, z, atol=2e-5)
        np.testing.assert_allclose(
            x, z if x.shape == z.shape else z.sum(0, keepdims=True), atol=2e-5
        )


def test_symbolic_sizes():
    """One exported program for every batch and length, segments and gradients included."""

    @jax.jit
    def grads(q: Array, k: Array, v: Array, ids: tuple[Array, Array], lengths: Array) -> Any:
        segments = {"query_segment_ids": ids[0], "key_value_segment_ids": ids[1]}
        call = functools.partial(attention, query_seq_lengths=lengths, is_causal=True, **segments)
        return jax.grad(lambda *x: (call(*x)[0] ** 2).sum(), (0, 1, 2))(q, k, v)

    def arguments(b: Any, t: Any, s: Any) -> Any:
        tensors = (b, t, 4, 8), (b, s, 2, 8), (b, s, 2, 8)
        q, k, v = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in tensors)
        integers = (b, t), (b, s), (b,)
        *ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in integers)
        return q, k, v, tuple(ids), lengths

    exported = export.export(grads)(*arguments(*export.symbolic_shape("b, t, s")))
    ids = documents(100, 50, ids=(3, 4)), documents(60, 70, 40, ids=(4, 0, 3))
    tensors = Case("documents", 150, 170, B=1, H=8).inputs(jnp.float32)
    concrete = (*tensors, tuple(jnp.asarray(x[None]) for x in ids), jnp.asarray(ints(149)))
    for x, y in zip(exported.call(*concrete), grads(*concrete), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
