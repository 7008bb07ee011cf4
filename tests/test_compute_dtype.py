"""compute_dtype: operands are cast to it, results and gradients come back in their own dtypes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from lowering import hide_gpus, lower, targets

import jax_fa3
from jax_fa3 import context_parallel, fp8

SHAPES = (2, 16, 4, 64), (2, 16, 2, 64), (2, 16, 2, 64)
DTYPES = [
    (jnp.float32, jnp.float32, jnp.float32),
    (jnp.float32, jnp.bfloat16, jnp.bfloat16),  # as rotary embeddings leave a query
    (jnp.float16, jnp.bfloat16, jnp.float32),
]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    hide_gpus(monkeypatch)


def operands(dtypes: Any, shapes: Any = SHAPES) -> list[jax.Array]:
    return [
        jax.random.normal(jax.random.key(i), shape).astype(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def results(function: Any, *qkv: Any) -> Any:
    out, pullback = jax.vjp(function, *qkv)
    return out, *pullback(out)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_is_casting_by_hand(dtypes, implementation):
    qkv = operands(dtypes)
    attention = functools.partial(
        jax_fa3.dot_product_attention, is_causal=True, implementation=implementation
    )

    def by_hand(*qkv):
        return attention(*(x.astype(jnp.bfloat16) for x in qkv)).astype(qkv[0].dtype)

    found = results(functools.partial(attention, compute_dtype="bfloat16"), *qkv)
    assert [x.dtype for x in found] == [qkv[0].dtype, *(x.dtype for x in qkv)]
    for x, y in zip(found, results(by_hand, *qkv), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError) if len(set(dtypes)) > 1 else pytest.raises(NotImplementedError):
        jax_fa3.dot_product_attention(*qkv, implementation="fa3")


def test_log_sum_exp_keeps_its_dtype():
    qkv = operands(DTYPES[1])
    out, lse = jax_fa3.dot_product_attention(*qkv, compute_dtype="bfloat16", return_residual=True)
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    one = jax_fa3.dot_product_attention(*(x[0] for x in qkv), compute_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(one, out[0])


def split(*qkv: Any, **options: Any) -> Any:
    mesh = jax.make_mesh((1,), ("sp",), axis_types=(jax.sharding.AxisType.Auto,))
    options["sharding"] = NamedSharding(mesh, PartitionSpec(None, "sp"))
    return context_parallel.dot_product_attention(*qkv, axis_name="sp", **options)


@pytest.mark.parametrize(
    "function", [jax_fa3.dot_product_attention, fp8.dot_product_attention, split]
)
def test_reaches_the_kernels(function):
    """And the gradients have the operands' dtypes; so is_supported says."""
    qkv = [jax.ShapeDtypeStruct(x, y) for x, y in zip(SHAPES, DTYPES[1], strict=True)]
    options: Any = {"compute_dtype": jnp.bfloat16, "implementation": "fa3"}

    def gradients(*qkv):
        return results(functools.partial(function, **options), *qkv)

    found = targets(lower(gradients, *qkv))
    assert found[-1] == "jax_fa3.bwd.v1"
    dtypes = [x.dtype for x in jax.eval_shape(gradients, *qkv)]
    assert dtypes == [jnp.float32, *DTYPES[1]]
    assert jax_fa3.is_supported(*qkv, compute_dtype=jnp.bfloat16, device="sm_90") is None
    reason = jax_fa3.is_supported(*qkv, device="sm_90")
    assert reason is not None and "compute_dtype=jnp.bfloat16" in reason


def test_packed():
    qkv = operands([jnp.float32], [(2, 16, 3, 4, 64)])[0]
    attention = functools.partial(jax_fa3.qkv_dot_product_attention, compute_dtype=jnp.bfloat16)
    out, dqkv = results(attention, qkv)
    assert out.dtype == dqkv.dtype == jnp.float32
    narrow = jax_fa3.qkv_dot_product_attention(qkv.astype(jnp.bfloat16))
    np.testing.assert_array_equal(out, narrow.astype(jnp.float32))


def test_not_of_arrays_that_are_quantized():
    qkv = [jnp.zeros(shape, jnp.float8_e4m3fn) for shape in SHAPES]
    scales: Any = [1.0] * 3
    with pytest.raises(ValueError, match="compute_dtype: got bfloat16, wanted None: dtype is the"):
        fp8.quantized_dot_product_attention(*qkv, *scales, compute_dtype="bfloat16")
