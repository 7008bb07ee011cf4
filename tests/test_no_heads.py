"""No query heads: empty results of the right shape, and gradients of 0, everywhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_fa3
from jax_fa3 import context_parallel, fp8

P = PartitionSpec
B, T, S, H, V = 2, 16, 32, 64, 128


@pytest.fixture(autouse=True)
def _cpu(on_cpu):
    pass


def operands(kv_heads: int, key_length: int = S, value_dim: int = V) -> tuple[Any, ...]:
    shapes = (B, T, 0, H), (B, key_length, kv_heads, H), (B, key_length, kv_heads, value_dim)
    return tuple(jnp.ones(shape, jnp.bfloat16) for shape in shapes)


def check(attention: Any, *arrays: Any) -> None:
    """attention: to (out, log-sum-exp)."""
    value_dim = arrays[-1].shape[-1]

    def loss(*arrays: Any) -> Any:
        out, lse = attention(*arrays)
        assert (out.shape, out.dtype) == ((B, T, 0, value_dim), jnp.bfloat16)
        assert (lse.shape, lse.dtype) == ((B, T, 0), jnp.float32)
        return out.sum().astype(jnp.float32) + lse.sum()

    grads = jax.jit(jax.grad(loss, tuple(range(len(arrays)))))(*arrays)
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in arrays]
    assert all(not np.asarray(g, np.float32).any() for g in grads)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("module", [jax_fa3, fp8])
@pytest.mark.parametrize("kv_heads", [0, 2])
def test_gradients(module, kv_heads, implementation):
    ids = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)

    def attention(*arrays: Any) -> Any:
        return module.dot_product_attention(
            *arrays,
            is_causal=True,
            query_segment_ids=ids[0],
            key_value_segment_ids=ids[1],
            implementation=implementation,
            return_residual=True,
        )

    check(attention, *operands(kv_heads))


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None)])
def test_vmap(axes):
    q, k, v = operands(2)
    arrays = [x if axis is None else x[None] for x, axis in zip((q, k, v), axes, strict=True)]
    assert jax.vmap(jax_fa3.dot_product_attention, axes)(*arrays).shape == (1, B, T, 0, V)


@pytest.mark.parametrize(("shape", "kv_heads"), [((B, T, 4, H), 2), ((B, T, 3, 0, H), None)])
def test_packed(shape, kv_heads):
    def attention(qkv: Any) -> Any:
        return jax_fa3.qkv_dot_product_attention(qkv, kv_heads, return_residual=True)

    check(attention, jnp.ones(shape, jnp.bfloat16))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("module", [jax_fa3, fp8])
def test_on_a_mesh(module, axis_type):
    """XLA's partitioner crashed on the products of nothing, and the process with it."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("x", None, "y"))
        arrays = [jax.device_put(x, sharding) for x in operands(2)]
        check(lambda *x: module.dot_product_attention(*x, return_residual=True), *arrays)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
def test_context_parallel(strategy):
    sharding = NamedSharding(jax.make_mesh((2,), ("s",), axis_types=(AxisType.Auto,)), P(None, "s"))
    options: Any = {"axis_name": "s", "strategy": strategy, "sharding": sharding}

    def attention(*arrays: Any) -> Any:
        return context_parallel.dot_product_attention(*arrays, return_residual=True, **options)

    check(attention, *operands(2, T))


def test_quantized():
    q, k, v = (x.astype(jnp.float8_e4m3fn) for x in operands(2, value_dim=H))
    out = fp8.quantized_dot_product_attention(q, k, v, 1.0, 1.0, 1.0, dtype=jnp.float16)
    assert (out.shape, out.dtype) == ((B, T, 0, H), jnp.float16)
    for implementation in (None, "xla"):
        quantized, scales = fp8.quantize(operands(2)[0], implementation=implementation)
        assert (quantized.shape, scales.shape) == ((B, T, 0, H), (B, 1, 0))
