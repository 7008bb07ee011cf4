"""Several intervals of keys a row: what is taken for them, and that they are what a dense mask is."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, Case
from helpers import assert_same, oracle, with_gradients
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, targets
from test_ffi import needs_kernels

import jax_fa3
from jax_fa3 import _targets, fp8

B, T, S = 2, 10, 12
attention = functools.partial(jax_fa3.dot_product_attention, return_residual=True)


def bounds(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Of any order, overlapping, empty, and beyond the keys."""
    rng = np.random.default_rng(seed)
    begin = rng.integers(-3, S, (B, T, count))
    return begin, begin + rng.integers(-1, 6, (B, T, count))


def case(count: int, **options: Any) -> Case:
    begin, end = bounds(count)
    return Case("several", T, S, B=B, H=8, mask={"key_begin": begin, "key_end": end, **options})


@pytest.mark.parametrize(
    "kind", [None, "traced", "vmap", AxisType.Auto, AxisType.Explicit], ids=str
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_gradients(count: int, kind: Any):
    one = case(count, **CAUSAL)
    inputs, cotangents = one.inputs(jnp.float32), one.cotangents(jnp.float32)
    exact = oracle(one, jnp.float32, inputs, cotangents)

    def call(begin: Any, end: Any, cotangents: Any, *inputs: Any) -> Any:
        options = {**one.arguments, "key_begin": begin, "key_end": end}
        return with_gradients(functools.partial(attention, **options), cotangents, *inputs)

    begin, end = (one.mask[name] for name in ("key_begin", "key_end"))
    if kind is None:
        found = jax.jit(functools.partial(call, begin, end))(cotangents, *inputs)
    elif kind == "traced":
        found = jax.jit(call)(jnp.asarray(begin), jnp.asarray(end), cotangents, *inputs)
    elif kind == "vmap":
        arrays = jax.tree.map(lambda x: jnp.asarray(x)[:, None], (begin, end, cotangents, *inputs))
        found = jax.tree.map(lambda x: x[:, 0], jax.jit(jax.vmap(call))(*arrays))
    else:
        mesh = Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            put = functools.partial(jax.device_put, device=NamedSharding(mesh, P("x")))
            given = jax.tree.map(lambda x: put(jnp.asarray(x)), (begin, end, cotangents, *inputs))
            found = jax.jit(call)(*given)
    assert_same(found, exact, rtol=1e-5)


def test_without_a_batch_axis_and_beside_a_mask():
    one, mask = case(3), np.random.default_rng(2).random((B, 1, T, S)) < 0.7
    inputs = one.inputs(jnp.float32)
    both = Case("both", T, S, B=B, H=8, mask={**one.mask, "mask": mask})
    for given in (one, both):
        exact = oracle(given, jnp.float32, inputs)
        options = {name: x[0] for name, x in given.mask.items()}
        out, lse = attention(*(x[0] for x in inputs), **options)
        np.testing.assert_allclose(out, exact.out[0], atol=1e-5)
        np.testing.assert_allclose(lse, exact.lse[0], atol=1e-5)
        np.testing.assert_allclose(attention(*inputs, **given.mask)[0], exact.out, atol=1e-5)


def test_one_row_without_a_batch_axis():
    q, k, v = case(2).inputs(jnp.float32)
    bounds: Any = {"key_begin": np.array([[0, 6]]), "key_end": np.array([[2, 9]])}
    whole = attention(q[:1, :1], k[:1], v[:1], **{name: x[None] for name, x in bounds.items()})
    found = attention(q[0, :1], k[0], v[0], **bounds)
    for x, y in zip(found, whole, strict=True):
        np.testing.assert_array_equal(x, y[0])


def test_beside_a_bias():
    one = case(2)
    inputs, bias = one.inputs(jnp.float32), jnp.ones((1, 1, T, S)).at[..., 3].set(2)
    exact = oracle(
        Case("bias", T, S, B=B, H=8, mask={**one.mask, "bias": bias}), jnp.float32, inputs
    )
    np.testing.assert_allclose(attention(*inputs, bias, **one.mask)[0], exact.out, atol=1e-5)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"key_begin": bounds(5)[0], "key_end": bounds(5)[1]}, "key_begin: got 5 intervals a row"),
    ({"key_begin": bounds(2)[0]}, "key_end: got None, wanted 2 for each row"),
    ({"key_begin": bounds(2)[0], "key_end": bounds(3)[1]}, r"key_end: got shape \(2, 10, 3\)"),
    ({"key_begin": bounds(2)[0], "key_end": bounds(2)[1][..., 0]}, r"key_end: got shape \(2, 10\)"),
    (
        {"key_begin": bounds(2)[0][:, :9], "key_end": bounds(2)[1]},
        r"key_begin: got shape \(2, 9, 2\)",
    ),
    ({"key_begin": bounds(2)[0] + 0.5, "key_end": bounds(2)[1]}, "key_begin: got values of dtype"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=[message for _, message in WRONG])
def test_wrong(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        attention(*case(1).inputs(jnp.float32), **options)


def test_who_does_not_take_them():
    q, k, v = Case("fp8", T, S, B=B, H=64).inputs(jnp.bfloat16)
    begin, end = bounds(2)
    with pytest.raises(
        NotImplementedError, match="key_begin: got several intervals a row, wanted one"
    ):
        fp8.dot_product_attention(q, k, v, key_begin=begin, key_end=end)
    shapes = [jax.ShapeDtypeStruct((B, n, 4, 192), jnp.bfloat16) for n in (T, S, S)]
    options: Any = {"key_begin": begin, "key_end": end, "device": "sm_90"}
    refused = jax_fa3.is_supported(*shapes, **options)
    assert refused is not None
    assert refused.startswith(
        "key_begin: got several intervals a row beside head dim 192, wanted none"
    )


@needs_kernels
def test_kernels_take_them():
    shapes = [jax.ShapeDtypeStruct((B, n, 4, 64), jnp.bfloat16) for n in (T, S, S)]
    begin, end = (jax.ShapeDtypeStruct((B, T, 2), jnp.int32) for _ in range(2))

    def loss(q: Any, k: Any, v: Any, begin: Any, end: Any) -> Any:
        options: Any = {"key_begin": begin, "key_end": end, "implementation": "fa3"}
        return jax_fa3.dot_product_attention(q, k, v, **options).astype(jnp.float32).sum()

    text = lower(jax.grad(loss, (0, 1, 2)), *shapes, begin, end)
    wanted = [_targets.MASK_BITS, _targets.FWD, _targets.MASK_BITS, _targets.BWD]
    assert targets(text) == wanted
