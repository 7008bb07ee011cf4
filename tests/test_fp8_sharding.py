"""Attention in FP8 over several devices: what one device computes, and nothing is exchanged."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, operations, targets
from meshes import AUTO, EXPLICIT, make_mesh, run

import jax_fa3
from jax_fa3 import fp8

B, T, N, K, H = 4, 140, 4, 2, 16
MASK = {"is_causal": True}
SPEC = P("x", None, "y")
KINDS = ["automatic", "argument", "explicit", "manual"]
QUANTIZE, FWD = "jax_fa3.quantize.v1", "jax_fa3.fwd_fp8.v1"


pytestmark = pytest.mark.usefixtures("on_cpu")


def inputs(head_dim: int = H) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, T, n, head_dim)), jnp.float16) for n in (N, K, K)]


LENGTHS = jnp.array([140, 3, 129, 0])


def placed(kind: str, call: Any, arrays: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
    """The call and its arrays, [B, ...] and [B, length, heads, ...], split over a mesh."""
    mesh = make_mesh(EXPLICIT if kind == "explicit" else AUTO, x=shape[0], y=shape[1])
    where = [NamedSharding(mesh, P(*SPEC[: x.ndim])) for x in arrays]
    if shape[1] > K:  # then only query is split over its heads
        where = [where[0], *(NamedSharding(mesh, P("x")) for _ in arrays[1:])]
    if kind == "argument":
        call = functools.partial(call, sharding=NamedSharding(mesh, SPEC))
    if kind == "manual":
        specs = tuple(P(*SPEC[: x.ndim]) for x in arrays)
        call = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=SPEC)
    return call, [jax.device_put(x, s) for x, s in zip(arrays, where, strict=True)]


def attend(query: Any, key: Any, value: Any, lengths: Any, **options: Any) -> Any:
    lengths = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    return fp8.dot_product_attention(query, key, value, **lengths, **MASK, **options)


def gradients(call: Any) -> Any:
    def loss(q, k, v, lengths):
        return jnp.sin(call(q, k, v, lengths).astype(jnp.float32)).mean()

    return lambda *x: (call(*x), jax.grad(loss, (0, 1, 2))(*x))


@functools.cache
def alone(quantization: Any) -> Any:
    call = functools.partial(attend, quantization=quantization)
    return jax.jit(gradients(call))(*inputs(), LENGTHS)


def assert_close(found: Any, exact: Any) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_heads(kind):
    """Forward and backward; of exchanges there is the loss alone."""
    call, arrays = placed(kind, attend, [*inputs(), LENGTHS], (2, 2))
    found, exchanged = run(gradients(call), *arrays)
    assert_close(found, alone("block"))
    assert exchanged <= {"all-reduce"}
    assert not run(call, *arrays)[1]


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
def test_one_scale_for_the_whole_array(kind):
    """Of all devices, where the arrays are."""
    call = functools.partial(attend, quantization="tensor")
    call, arrays = placed(kind, call, [*inputs(), LENGTHS], (2, 2))
    found, exchanged = run(call, *arrays)
    assert_close(found, alone("tensor")[0])
    assert exchanged <= {"all-reduce"}


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
def test_wider_than_the_key_value_heads(kind):
    call, arrays = placed(kind, attend, [*inputs(), LENGTHS], (2, 4))
    found, exchanged = run(call, *arrays)
    assert_close(found, alone("block")[0])
    assert not exchanged


def pieces(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """The same by the public pieces."""
    (q, qs), (k, ks), (v, vs) = (fp8.quantize(x) for x in (q, k, v))
    options = {"dtype": jnp.float16} | MASK | options
    return fp8.quantized_dot_product_attention(q, k, v, qs, ks, vs, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces(kind):
    exact = jax.jit(pieces)(*inputs())
    call, arrays = placed(kind, pieces, inputs(), (2, 2))
    found, exchanged = run(call, *arrays)
    assert_close(found, exact)
    assert not exchanged


def test_lowers_to_local_calls():
    call, arrays = placed("manual", attend, [*inputs(64), LENGTHS], (2, 2))
    text = lower(call, *arrays)
    assert targets(text) == [QUANTIZE] * 3 + [FWD]
    assert not [x for x in operations(text) if x.startswith("all_")]
    assert "(tensor<2x140x2x64xf8E4M3FN>, tensor<2x140x1x64xf8E4M3FN>, " in text


def test_export():
    """One program for both platforms, of any batch and length."""
    b, t = jax.export.symbolic_shape("b, t")
    arrays = [jax.ShapeDtypeStruct((b, t, n, 64), jnp.float16) for n in (N, K, K)]
    lengths = jax.ShapeDtypeStruct((b,), jnp.int32)
    checks = jax_fa3.DISABLE_JAX_EXPORT_CHECKS
    export = jax.export.export(jax.jit(attend), platforms=("cpu", "cuda"), disabled_checks=checks)
    exported = export(*arrays, lengths)
    assert targets(exported.mlir_module()) == [QUANTIZE] * 3 + [FWD]
    found = exported.call(*inputs(64), LENGTHS)
    assert_close(found, jax.jit(attend)(*inputs(64), LENGTHS))
