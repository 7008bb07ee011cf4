"""Sinks in plain JAX, alone and under what splits and batches calls; on a GPU: test_gpu_sinks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, Case
from helpers import assert_rounded, assert_same, both_oracles
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, targets
from sinks import SINKS, WithSinks, assert_gradient, exact, inputs, with_gradients
from test_ffi import needs_kernels

import jax_fa3
from jax_fa3 import _reference, _targets, context_parallel, fp8

attention = functools.partial(jax_fa3.dot_product_attention, return_residual=True)


def function(case: Case, call: Any = attention, **options: Any) -> Any:
    """Of query, key, value and sinks."""
    arguments = case.arguments | options
    return lambda q, k, v, sinks: call(q, k, v, **arguments | {"sinks": sinks})


def test_the_oracle_is_the_softmax_with_a_column_more():
    """As gpt-oss writes it."""
    case = Case("small", 5, 6, 4, 4, H=8)
    q, k, v = case.inputs(jnp.float32)
    sinks = jnp.array([0.5, -1, 4, 0])
    out, lse = _reference.attention(q, k, v, sinks=sinks)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (2, 4, 5, 1))], -1)
    wanted = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores)[..., :-1], v)
    np.testing.assert_allclose(out, wanted, atol=1e-6)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(scores, -1).swapaxes(1, 2), atol=1e-6)


def assert_close(found: WithSinks, wanted: WithSinks, rtol: float = 1e-5) -> None:
    assert_same(found.results, wanted.results, rtol=rtol)
    scale = np.abs(wanted.dsinks).max(initial=1)
    np.testing.assert_allclose(found.dsinks, wanted.dsinks, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("case", SINKS, ids=str)
def test_table(case: Case):
    """Values and gradients, by JAX's derivative and by our own."""
    with jax.enable_x64(True):
        wide, outer = inputs(case, jnp.float64), case.cotangents(jnp.float64)
        exactly = exact(case, wide, outer)
    arrays, cotangents = inputs(case, jnp.bfloat16), case.cotangents(jnp.bfloat16)
    in_16_bits = exact(case, arrays, cotangents)
    oracles = jax.jit(both_oracles, static_argnums=(0, 1))
    wanted, rounded = oracles(case, jnp.bfloat16, arrays[:3], cotangents)
    for implementation in ("xla", None):
        call = functools.partial(with_gradients, function(case, implementation=implementation))
        with jax.enable_x64(True):
            assert_close(jax.jit(call)(outer, *wide), exactly, rtol=1e-12)
        found = jax.jit(call)(cotangents, *arrays)
        assert found.results.dk.dtype == jnp.bfloat16 and found.dsinks.dtype == jnp.float32
        assert_gradient(found, in_16_bits, arrays[3], cotangents)
        assert_rounded(found.results, wanted, rounded, case, jnp.finfo(jnp.bfloat16).eps)


SMALL = Case("small", 16, 16, 8, 4, 16, B=4, mask=CAUSAL, sinks=(0, 1, -1, 2, 3, -2, 0.5, 4))


def gradients(call: Any) -> Any:
    """Of cotangents, query, key, value and sinks, jitted, to a tuple of all results."""
    return jax.jit(functools.partial(with_gradients, call))


def expected(case: Case = SMALL) -> WithSinks:
    return exact(case, inputs(case, jnp.float32), case.cotangents(jnp.float32))


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x"), P("y", None, "x")], ids=str)
@pytest.mark.parametrize("kind", ["argument", AxisType.Explicit, AxisType.Auto], ids=str)
def test_sharding(kind: Any, spec: Any, implementation: Any):
    """Sinks are split with the heads, wherever they lie before; their gradient is summed over the
    batch."""
    types = (AxisType.Auto if kind == "argument" else kind,) * 2
    mesh = Mesh(np.reshape(jax.devices(), (2, 4)), ("y", "x"), axis_types=types)
    options: Any = {"implementation": implementation}
    if kind == "argument":
        options["sharding"] = NamedSharding(mesh, spec)
    heads = P(spec[2] if len(spec) > 2 else None)
    arrays, cotangents = inputs(SMALL, jnp.float32), SMALL.cotangents(jnp.float32)
    with jax.set_mesh(mesh):
        for own in (P(), heads):
            where = spec, spec, spec, own
            put = [
                jax.device_put(x, NamedSharding(mesh, s))
                for x, s in zip(arrays, where, strict=True)
            ]
            outer = tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x in cotangents)
            found = gradients(function(SMALL, **options))(outer, *put)
            assert_close(found, expected())


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
@pytest.mark.parametrize("heads", [None, "y"])
@pytest.mark.parametrize("implementation", ["xla", None])
def test_context_parallel(strategy: Any, heads: Any, implementation: Any):
    """Counted once, not by each device; rows that see nothing and padding stay what they are."""
    lengths = {"query_seq_lengths": np.array([16, 9, 0, 16]), "query_offset": -3}
    case = dataclasses.replace(SMALL, mask=CAUSAL | lengths, planted=True)
    mesh = Mesh(np.reshape(jax.devices()[:4], (2, 2)), ("y", "x"))
    options: Any = {"axis_name": "x", "strategy": strategy, "zigzag": False}
    options |= {"sharding": NamedSharding(mesh, P(None, "x", heads))}
    call = functools.partial(context_parallel.dot_product_attention, return_residual=True)
    call = gradients(function(case, call, implementation=implementation, **options))
    found = call(case.cotangents(jnp.float32), *inputs(case, jnp.float32))
    assert_close(found, expected(case))


def test_a_broken_run_leaves_other_gradients_alone_in_a_ring():
    ids = np.repeat([[0, 1, 0, 2]], 4, axis=1)
    mask = {"query_segment_ids": ids, "key_value_segment_ids": ids}
    case = dataclasses.replace(SMALL, B=1, mask=mask)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    options: Any = {"axis_name": "x", "sharding": NamedSharding(mesh, P(None, "x"))}
    call = functools.partial(context_parallel.dot_product_attention, return_residual=True)
    text = jnp.asarray(ids != 0)[..., None]
    dout, dlse = case.cotangents(jnp.float32)
    cotangents = jnp.where(text[..., None], dout, 0), jnp.where(text, dlse, 0)
    found = gradients(function(case, call, **options))(cotangents, *inputs(case, jnp.float32))
    assert np.isnan(found.results.out).any() and np.isfinite(found.dsinks).all()
    assert_close(found, exact(case, inputs(case, jnp.float32), cotangents))


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, None, None), (0, 0, 0, None), (None, None, None, 0)], ids=str)  # fmt: skip
def test_vmap(axes: Any):
    """Over each entry of the batch, or of the sinks alone."""
    call = function(SMALL)
    arrays, cotangents = inputs(SMALL, jnp.float32), SMALL.cotangents(jnp.float32)
    many = [
        x if axis is None else jnp.stack([x, x[::-1], x * 2])
        for x, axis in zip(arrays, axes, strict=True)
    ]
    one = functools.partial(with_gradients, call, cotangents)
    found = jax.jit(jax.vmap(one, axes))(*many)
    for i in range(3):
        entry = one(*(x if axis is None else x[i] for x, axis in zip(many, axes, strict=True)))
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), entry)


@pytest.mark.parametrize("num_kv_heads", [None, 4])
@pytest.mark.parametrize("implementation", ["xla", None])
def test_packed(num_kv_heads: int | None, implementation: Any):
    q, k, v, sinks = inputs(SMALL, jnp.float32)
    options: Any = {"is_causal": True, "return_residual": True, "implementation": implementation}
    if num_kv_heads is None:
        k, v = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)

    def packed(q: Array, k: Array, v: Array, sinks: Array) -> Any:
        x = jnp.stack([q, k, v], 2) if num_kv_heads is None else jnp.concatenate([q, k, v], 2)
        return jax_fa3.qkv_dot_product_attention(x, num_kv_heads, sinks=sinks, **options)

    cotangents = SMALL.cotangents(jnp.float32)
    found = gradients(packed)(cotangents, q, k, v, sinks)
    wanted = gradients(function(SMALL))(cotangents, q, k, v, sinks)
    assert_close(found, wanted)


@pytest.mark.parametrize("implementation", ["xla", None])
def test_fp8(implementation: Any):
    """What sinks make of the results without them; gradients of 16 bits."""
    case = dataclasses.replace(SMALL, H=64)
    q, k, v, sinks = inputs(case, jnp.bfloat16)
    call = functools.partial(fp8.dot_product_attention, return_residual=True)
    options: Any = {"is_causal": True, "implementation": implementation}
    out, lse = call(q, k, v, sinks=sinks, **options)
    plain, plain_lse = call(q, k, v, smooth_k=False, **options)  # as beside sinks
    np.testing.assert_allclose(lse, jnp.logaddexp(plain_lse, sinks), rtol=1e-5)
    share = jax.nn.sigmoid(plain_lse - sinks)[..., None]
    wanted = (plain * share).astype(jnp.float32)
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, rtol=0, atol=0.03)
    arrays = [fp8.quantize(x) for x in (q, k, v)]
    quantized = [x for x, _ in arrays] + [scale for _, scale in arrays]
    options |= {"sinks": sinks, "return_residual": True}
    attend = fp8.quantized_dot_product_attention
    out, lse = attend(*quantized, **options)
    same, same_lse = call(q, k, v, incoherent_key=None, smooth_v=False, **options)
    np.testing.assert_array_equal(out, same)
    np.testing.assert_array_equal(lse, same_lse)
    found = gradients(function(case, call))(case.cotangents(jnp.bfloat16), q, k, v, sinks)
    in_16_bits = gradients(function(case))(case.cotangents(jnp.bfloat16), q, k, v, sinks)
    scale = np.abs(in_16_bits.dsinks).max()
    np.testing.assert_allclose(found.dsinks, in_16_bits.dsinks, rtol=0, atol=0.1 * scale)


@needs_kernels
def test_kernels_take_them():
    """As an operand of the forward; the backward's kernels need none, nor what the forward gave."""
    case = dataclasses.replace(SMALL, H=64)
    arrays = inputs(case, jnp.bfloat16)
    call = function(case, functools.partial(jax_fa3.dot_product_attention, implementation="fa3"))
    text = lower(call, *arrays)
    assert targets(text) == [_targets.FWD] and "tensor<1x8xf32>" in text
    text = lower(jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), (0, 1, 2, 3)), *arrays)
    assert targets(text) == [_targets.FWD, _targets.BWD]
    assert jax_fa3.is_supported(*arrays[:3], sinks=arrays[3], device="sm_90") is None
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    assert jax_fa3.is_supported(*arrays[:3], sinks=shape, device="sm_90") is None


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (jnp.ones(4), r"sinks: got shape \(4,\), wanted \(8,\), one for each query head"),
        (jnp.ones((1, 8)), r"sinks: got shape \(1, 8\), wanted"),
        (jnp.ones(8, int), "sinks: got dtype int32, wanted a floating dtype"),
        ("a", "sinks: got 'a', wanted an array of numbers"),
    ],
)
def test_wrong(sinks: Any, message: str):
    q, k, v = SMALL.inputs(jnp.bfloat16)
    with pytest.raises(ValueError, match=message):
        jax_fa3.dot_product_attention(q, k, v, sinks=sinks)


def test_their_own_dtype():
    q, k, v, sinks = inputs(SMALL, jnp.bfloat16)
    sinks = sinks.astype(jnp.bfloat16)
    grad = jax.grad(lambda s: attention(q, k, v, sinks=s)[1].sum())(sinks)
    assert grad.dtype == jnp.bfloat16 and grad.shape == (8,) and (grad > 0).all()
