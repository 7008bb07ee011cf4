"""A dense bias: what the kernels are given, and its gradient through every transformation, here in plain
JAX. On a GPU: test_gpu_bias."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from biases import oracles, with_gradients
from cases import CAUSAL, Case
from helpers import assert_close
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, targets
from test_ffi import needs_kernels

import jax_fa3
from jax_fa3 import _bias, _targets
from jax_fa3._operands import Operands
from jax_fa3._problem import Config

B, T, S, N, K, H = 2, 10, 12, 4, 2, 8
CONFIG = Config(0.5, (None, None), None, False)
CASE = Case("bias", T, S, N, K, H, B=B, mask=CAUSAL)
FORMS = [(B, N, T, S), (1, N, T, S), (B, 1, T, S), (1, 1, T, S), (1, N, 1, S), (1, 1, 1, S)]


def normal(*shape: int, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(form: tuple[int, ...]) -> tuple[Array, ...]:
    """query, key, value and bias, which hides some keys and all of one row."""
    bias = normal(*form, seed=3).at[..., 3].set(-jnp.inf).at[..., 5].set(-2e37)
    return *CASE.inputs(jnp.float32), bias if form[2] == 1 else bias.at[:, :, 4].set(-jnp.inf)


def attention(*arrays: Array, **options: Any) -> Any:
    q, k, v, bias = arrays
    options |= {"return_residual": True, "is_causal": True}
    return jax_fa3.dot_product_attention(q, k, v, bias, **options)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit, "argument"], ids=str)
def test_gradients(form: tuple[int, ...], kind: Any):
    """Over devices that share the bias, too."""
    arrays, cotangents = inputs(form), CASE.cotangents(jnp.float32)
    exact, _ = oracles(CASE, arrays, cotangents)
    call = jax.jit(functools.partial(with_gradients, attention))
    if kind is None:
        return assert_close(call(cotangents, *arrays), exact, 1e-4)
    kinds = (AxisType.Auto if kind == "argument" else kind,) * 2
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"), axis_types=kinds)
    where = P("x", None, "y")
    if kind == "argument":
        sharded = functools.partial(attention, sharding=NamedSharding(mesh, where))
        return assert_close(
            jax.jit(functools.partial(with_gradients, sharded))(cotangents, *arrays), exact, 1e-4
        )
    with jax.set_mesh(mesh):
        put = [jax.device_put(x, NamedSharding(mesh, where)) for x in (*arrays[:3], *cotangents)]
        of_bias = P(*("x" if form[0] > 1 else None, "y" if form[1] > 1 else None))
        bias = jax.device_put(arrays[3], NamedSharding(mesh, of_bias))
        assert_close(call(tuple(put[3:]), *put[:3], bias), exact, 1e-4)


@pytest.mark.parametrize("form", FORMS[1:4], ids=str)
def test_under_vmap(form: tuple[int, ...]):
    """Entries that share a bias have a gradient each."""
    q, *others = inputs(form)
    cotangents = CASE.cotangents(jnp.float32)
    call = functools.partial(with_gradients, attention)
    found = jax.jit(jax.vmap(call, (None, 0, None, None, None)))(
        cotangents, jnp.stack((q, 2 * q)), *others
    )
    for i in range(2):
        exact, _ = oracles(CASE, ((i + 1) * q, *others), cotangents)
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), exact, 1e-4)


def test_deterministic_gradients_are_those():
    arrays, cotangents = inputs((1, N, T, S)), CASE.cotangents(jnp.float32)
    call = functools.partial(attention, deterministic_backward=True)
    exact, _ = oracles(CASE, arrays, cotangents)
    assert_close(with_gradients(call, cotangents, *arrays), exact, 1e-4)


def operands(bias: Array | None, mask: Any = None, dtype: Any = jnp.bfloat16) -> Operands:
    q, k, v = (x.astype(dtype) for x in CASE.inputs(jnp.float32))
    return Operands(q, k, v, bias=bias, mask=mask)


@pytest.mark.parametrize(
    "dtype, given, wanted",
    [
        (jnp.bfloat16, (1, N, T, S), (jnp.bfloat16, (1, N, T, 16))),
        (jnp.float32, (1, N, T, S), (jnp.float32, (1, N, T, S))),
        (jnp.float16, (B, 1, 1, S), (jnp.float32, (B, 1, 1, S))),
        (jnp.bfloat16, (1, 1, T, 1), (jnp.bfloat16, (1, 1, T, 16))),
    ],
)
def test_what_the_kernels_read(dtype: Any, given: tuple[int, ...], wanted: tuple[Any, Any]):
    """Whole vectors, and nothing that is broadcast over batch, heads or rows is expanded."""
    bias = normal(*given).astype(dtype)
    found = _bias.for_kernels(CONFIG, operands(bias))
    assert found is not None and (found.dtype, found.shape) == wanted
    whole = jnp.broadcast_to(bias, (*given[:3], S)).astype(jnp.float32)
    np.testing.assert_array_equal(found[..., :S], whole)


def test_a_mask_is_a_bias():
    mask = np.random.default_rng(0).random((B, 1, T, S)) < 0.5
    found = _bias.for_kernels(CONFIG, operands(None, mask))
    assert found is not None and found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[..., :S] == 0, mask)
    bias = normal(1, N, T, S)
    found = _bias.for_kernels(CONFIG, operands(bias, mask))
    np.testing.assert_array_equal(found, np.where(mask, bias, -np.inf))
    summed = _bias.gradient(jnp.ones((B, N, T, S)), operands(bias, mask))
    np.testing.assert_array_equal(summed, np.full(bias.shape, B))


@pytest.mark.parametrize(
    "change, found",
    [
        ({"logits_soft_cap": 3.0}, "logits_soft_cap: got one beside a bias"),
        ({"head_dim": 136}, "bias: got one beside head dim 136"),
        ({"keys": 2**18 + 8}, "bias: got 262152 keys"),
    ],
)
def test_refusals_name_the_argument(change: dict[str, Any], found: str):
    head_dim, keys = change.pop("head_dim", 64), change.pop("keys", S)
    q, k = (jax.ShapeDtypeStruct((B, n, N, head_dim), jnp.bfloat16) for n in (T, keys))
    bias = jax.ShapeDtypeStruct((1, 1, 1, keys), jnp.float32)
    reason = jax_fa3.is_supported(q, k, k, bias, device="sm_90", **change)
    assert found in (reason or "") and "implementation='xla'" in (reason or "")


def test_exported_for_any_batch():
    """One bias for all of a batch whose size is not known yet."""
    (batch,) = jax.export.symbolic_shape("b")
    shapes = (batch, T, N, H), (batch, S, K, H), (batch, S, K, H), (1, N, T, S)
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def grads(*arrays: Array) -> Any:
        return jax.grad(lambda *x: attention(*x)[0].sum(), (0, 1, 2, 3))(*arrays)

    exported = jax.export.export(jax.jit(grads), platforms=("cpu",))(*structs)
    arrays = inputs((1, N, T, S))
    assert_close(exported.call(*arrays), grads(*arrays), 1e-5)


def test_of_no_batch():
    bias = normal(1, N, T, S)
    q, k = jnp.ones((0, T, N, H)), jnp.ones((0, S, K, H))
    (found,) = jax.vjp(lambda bias: attention(q, k, k, bias)[0], bias)[1](jnp.ones((0, T, N, H)))
    np.testing.assert_array_equal(found, jnp.zeros_like(bias))


@needs_kernels
def test_kernels_take_it():
    q, k = (jax.ShapeDtypeStruct((B, n, N, 64), jnp.bfloat16) for n in (T, S))
    bias = jax.ShapeDtypeStruct((1, N, T, S), jnp.float32)

    def loss(*arrays: Array) -> Array:
        return attention(*arrays, implementation="fa3")[0].astype(jnp.float32).sum()

    text = lower(jax.grad(loss, (0, 1, 2, 3)), q, k, k, bias)
    assert targets(text) == [_targets.FWD, _targets.BWD]
    assert text.count("stablehlo.broadcast_in_dim") == lower(
        jax.grad(loss, (0, 1, 2, 3)), q, k, k, jax.ShapeDtypeStruct((B, N, T, S), jnp.float32)
    ).count("stablehlo.broadcast_in_dim")
    assert jax_fa3.is_supported(q, k, k, bias, device="sm_90") is None


@needs_kernels
def test_a_gradient_that_nobody_wants_is_not_computed():
    shapes = [jax.ShapeDtypeStruct((B, n, N, 64), jnp.bfloat16) for n in (T, S, S)]
    bias = jax.ShapeDtypeStruct((1, N, T, S), jnp.bfloat16)

    def loss(*arrays: Array) -> Array:
        out = jax_fa3.dot_product_attention(*arrays, implementation="fa3")
        return out.astype(jnp.float32).sum()

    sizes = f"tensor<1x{N}x{T}x16xf32>"
    for arguments, wanted in (((0, 1, 2), False), ((0, 3), True)):
        text = lower(jax.grad(loss, arguments), *shapes, bias)
        assert targets(text) == [_targets.FWD, _targets.BWD]
        assert (sizes in text) == wanted


def test_gradients_of_others_beside_a_bias():
    arrays, cotangents = inputs(FORMS[0]), CASE.cotangents(jnp.float32)
    exact, _ = oracles(CASE, arrays, cotangents)
    _, pullback = jax.vjp(lambda *x: attention(*x, arrays[3]), *arrays[:3])
    assert_close(pullback(cotangents), exact.results[2:], 1e-4)
