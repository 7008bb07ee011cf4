"""Sinks on a Hopper GPU: the forward's epilogue, FP8's, and the gradient beside the backward's."""

import functools
from typing import Any

import fp8_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, Case
from helpers import ROWS, Results, assert_rounded, beside_fp64, both_oracles, equal, poison
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sinks import SINKS, assert_gradient, exact, inputs, with_gradients

import jax_fa3
from jax_fa3 import context_parallel, fp8

pytestmark = pytest.mark.gpu

attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)
oracles = jax.jit(both_oracles, static_argnums=(0, 1))


def check(case: Case, arrays: Any, cotangents: Any, call: Any = attention, **options: Any) -> None:
    """call of these arrays by the rule of tolerance."""
    arguments, dtype = case.arguments | options, arrays[0].dtype
    call = functools.partial(lambda f, q, k, v, s: f(q, k, v, **arguments | {"sinks": s}), call)
    poison(case, dtype)
    found = jax.jit(functools.partial(with_gradients, call))(cotangents, *arrays)
    results = found.results
    assert results.out.dtype == results.dq.dtype == dtype and results.lse.dtype == jnp.float32
    assert_gradient(found, exact(case, arrays, cotangents), arrays[3], cotangents)
    wanted, rounded = oracles(case, dtype, arrays[:3], cotangents)
    rows = ROWS
    if case.name == "large":  # as in test_gpu_values: fp32 has not digits enough for such scores
        wanted, rounded = beside_fp64(case, wanted, rounded, cotangents, arrays[:3])
        rows = case.T
    assert_rounded(results, wanted, rounded, case, jnp.finfo(dtype).eps, rows)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", SINKS, ids=str)
def test_table(case: Case, dtype: Any):
    check(case, inputs(case, dtype), case.cotangents(dtype))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("values", ["means", "small", "large"])
def test_values(values: str, head_dim: int):
    case = Case(values, 300, 333, H=head_dim, mask=CAUSAL, sinks=(0.0, -2.0, 3.0, 1.5))
    change: Any = {"means": lambda x: 1 + 0.3 * x, "small": lambda x: 1e-3 * x}
    change = change.get(values, lambda x: 30 * x)
    query, key, value, own = inputs(case, jnp.bfloat16)
    check(case, (*map(change, (query, key, value)), own), case.cotangents(jnp.bfloat16))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sinks_among_large_scores(head_dim: int):
    """Of 1e3 and more. (Gradients have an error in the few rows where the sink is near the top alone.)"""
    case = Case("large", 300, 333, H=head_dim, mask=CAUSAL, sinks=(900.0, 1500.0, 2500.0, 4000.0))
    q, k, v = (30 * x for x in case.inputs(jnp.bfloat16))
    found = Results(*jax.jit(functools.partial(attention, **case.arguments))(q, k, v))
    wanted, rounded = oracles(case, jnp.bfloat16, (q, k, v))
    assert_rounded(found, wanted, rounded, case, jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
def test_context_parallel(strategy: Any):
    """On a mesh of one: the path, not the exchange."""
    case = next(case for case in SINKS if case.name == "sinks, long")
    mesh = Mesh(np.array(jax.local_devices(backend="cuda")[:1]), ("x",))
    options: Any = {"axis_name": "x", "strategy": strategy}
    options |= {"sharding": NamedSharding(mesh, P(None, "x")), "return_residual": True}
    options |= {"implementation": "fa3"}
    arrays, cotangents = inputs(case, jnp.bfloat16), case.cotangents(jnp.bfloat16)
    check(case, arrays, cotangents, context_parallel.dot_product_attention, **options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("case", SINKS[::2], ids=str)
def test_fp8(case: Case, head_dim: int):
    case = Case(case.name, case.T, case.S, H=head_dim, B=case.B, mask=case.mask, sinks=case.sinks)
    tensors, scales = fp8_oracle.scaled(case)
    poison(case, jnp.bfloat16)
    call = functools.partial(fp8.quantized_dot_product_attention, **case.arguments)
    found = jax.jit(functools.partial(call, implementation="fa3", return_residual=True))
    dequantized = fp8_oracle.all_dequantized(tensors, scales)
    wanted = fp8_oracle.oracle(case, dequantized)
    rounded = fp8_oracle.oracle(case, dequantized, jnp.bfloat16, stepwise=True)
    results = Results(*found(*tensors, *scales))
    assert_rounded(results, wanted, rounded, case, jnp.finfo(jnp.bfloat16).eps)


def test_vmap_over_sinks_alone():
    """Each entry has its own: [B, N] for the kernel."""
    q, k, v, sinks = inputs(SINKS[0], jnp.bfloat16)
    many = jnp.stack([sinks, sinks[::-1], sinks + 3])
    call = jax.jit(lambda s: attention(q, k, v, sinks=s, is_causal=True))
    found = jax.jit(jax.vmap(call))(many)
    for i in range(3):
        assert equal([x[i] for x in found], call(many[i]))


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_none_is_far_below(head_dim: int):
    """Bit by bit: sinks that weigh nothing change nothing."""
    case = Case("none", 300, 333, H=head_dim, mask=CAUSAL)
    q, k, v = case.inputs(jnp.bfloat16)
    found = jax.jit(lambda s: attention(q, k, v, sinks=s, is_causal=True))(jnp.full(4, -1e4))
    assert equal(found, jax.jit(lambda: attention(q, k, v, is_causal=True))())
