"""relative_bias on a Hopper GPU, and its gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from biases import LONG, PAST, with_gradients
from cases import CAUSAL, Case
from distances import assert_table, table_of
from helpers import assert_rounded, both_oracles, equal, poison
from masks import documents, packed

import jax_fa3

pytestmark = pytest.mark.gpu

attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)
oracles = jax.jit(both_oracles, static_argnums=(0, 1))
WINDOW: dict[str, Any] = {"local_window_size": (40, 3)}
CASES = [
    Case("causal", H=128, mask=CAUSAL),
    Case("full", 300, 333, 8, 2, H=64, B=1),
    Case("window", 300, 333, 6, 6, H=128, mask=WINDOW),
    Case("long", 1500, 1500, H=64, B=1, mask=CAUSAL),
    Case("long", 700, 1900, 4, 4, H=128, B=1),
    Case("planted", B=3, H=64, mask=PAST, planted=True),
    Case("planted", B=3, H=128, mask=PAST, planted=True),
    Case("planted, full", 300, 384, B=3, H=64, mask=LONG, planted=True),
    Case("documents", 200, 200, H=128, B=1, mask=packed(documents(50, 40, 60, 50))),
    Case("broken run", 200, 200, B=1, mask=packed(documents(50, 40, 60, 50, ids=(0, 1, 0, 2)))),
    Case("sinks", H=128, mask=CAUSAL, sinks=(0.0, -2.0, 3.0, 1.5)),
    Case("offset", 77, 300, H=64, mask={**CAUSAL, "query_offset": 223}),
    Case("offsets", 77, 300, H=128, mask={**CAUSAL, "query_offset": np.array([223, 5])}),
    Case("one row", 1, 300),
    Case("one key", 300, 1, H=128),
    Case("heads", 150, 270, 6, 2, H=104, V=72),
    Case("heads", 150, 270, 6, 2, H=96, mask=CAUSAL),
    Case("heads", 150, 270, 6, 2, H=80),
    Case("heads", 150, 270, 16, 1, H=128, mask=CAUSAL),
]


def call_of(case: Case, **options: Any) -> Any:
    def call(q: Any, k: Any, v: Any, table: Any) -> Any:
        return attention(q, k, v, relative_bias=table, **case.arguments | options)

    return call


def check(case: Case, arrays: Any, **options: Any) -> Any:
    dtype, table = arrays[0].dtype, arrays[3]
    cotangents = case.cotangents(dtype)
    poison(case, dtype)
    found = jax.jit(functools.partial(with_gradients, call_of(case, **options)))(
        cotangents, *arrays
    )
    given = dataclasses.replace(case, mask={**case.mask, "relative_bias": table})
    exact, rounded = oracles(given, dtype, arrays[:3], cotangents)
    assert_rounded(found.results, exact, rounded, case, jnp.finfo(dtype).eps)
    if not case.planted:
        assert_table(found.dbias, case, arrays, cotangents)
    else:
        assert np.isfinite(found.dbias).all()
    return found


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.H}")
def test_table(case: Case, dtype: Any):
    check(case, (*case.inputs(dtype), table_of(case, 150)))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("farthest", [0, 7, 128, 1000])
def test_any_table(farthest: int, head_dim: int):
    case = Case("tables", 260, 600, 4, 2, H=head_dim)
    check(case, (*case.inputs(jnp.bfloat16), table_of(case, farthest, 4.0)))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("values", ["means", "small", "large"])
def test_values(values: str, head_dim: int):
    case = Case(values, 300, 333, H=head_dim, mask=CAUSAL)
    change: Any = {
        "means": lambda x: 1 + 0.3 * x, "small": lambda x: 1e-3 * x, "large": lambda x: 30 * x,
    }[values]  # fmt: skip
    check(case, (*map(change, case.inputs(jnp.bfloat16)), table_of(case, 100)))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_deterministic(head_dim: int):
    case = Case("deterministic", 700, 513, 8, 2, H=head_dim, B=3, mask=CAUSAL)
    arrays = *case.inputs(jnp.bfloat16), table_of(case, 200)
    first = check(case, arrays, deterministic_backward=True)
    call = functools.partial(with_gradients, call_of(case, deterministic_backward=True))
    for _ in range(3):
        assert equal(jax.jit(call)(case.cotangents(jnp.bfloat16), *arrays), first)


def test_buckets_of_t5():
    case = Case("t5", 400, 400, 4, 4, H=64, scale=1.0)
    arrays, cotangents = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    buckets = jnp.asarray(np.random.default_rng(0).standard_normal((4, 32)), jnp.float32)

    def call(q: Any, k: Any, v: Any, buckets: Any) -> Any:
        table = jax_fa3.t5_relative_bias(buckets)
        return call_of(case, deterministic_backward=True)(q, k, v, table)

    found = jax.jit(functools.partial(with_gradients, call))(cotangents, *arrays, buckets)
    table, pullback = jax.vjp(jax_fa3.t5_relative_bias, buckets)
    by_distance = check(case, (*arrays, table), deterministic_backward=True).dbias
    (wanted,) = pullback(by_distance)
    scale = np.abs(pullback(jnp.abs(by_distance))[0])
    assert (np.abs(found.dbias - wanted) <= 1e-5 * scale).all()  # the order of sums


def test_packed_array():
    case = Case("packed", 200, 200, 4, 4, H=64, mask=CAUSAL)
    arrays, cotangents = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    table = table_of(case, 60)

    def packed(q: Any, k: Any, v: Any, table: Any) -> Any:
        options: Any = {"implementation": "fa3", "return_residual": True, "relative_bias": table}
        return jax_fa3.qkv_dot_product_attention(jnp.stack((q, k, v), 2), **CAUSAL, **options)

    found = jax.jit(functools.partial(with_gradients, packed))(cotangents, *arrays, table)
    given = dataclasses.replace(case, mask={**CAUSAL, "relative_bias": table})
    exact, rounded = oracles(given, jnp.bfloat16, arrays, cotangents)
    assert_rounded(found.results, exact, rounded, case, jnp.finfo(jnp.bfloat16).eps)
    assert_table(found.dbias, case, (*arrays, table), cotangents)


def test_a_dense_mask_beside_it():
    case = Case("mask", 200, 260, H=64)
    arrays = *case.inputs(jnp.bfloat16), table_of(case, 60)
    visible = np.tril(np.ones((1, 1, 200, 260), bool))
    call = jax.jit(call_of(case, mask=visible))
    assert equal(call(*arrays), jax.jit(call_of(case, is_causal=True))(*arrays))


def test_under_vmap():
    case = Case("vmap", 100, 130, H=64)
    *tensors, table = *case.inputs(jnp.bfloat16), table_of(case, 60)
    call = functools.partial(with_gradients, call_of(case, deterministic_backward=True))
    cotangents = case.cotangents(jnp.bfloat16)
    of_both = jnp.stack((table, -table / 8))
    found = jax.jit(jax.vmap(call, (None, None, None, None, 0)))(cotangents, *tensors, of_both)
    for i, x in enumerate(of_both):
        entry = jax.tree.map(lambda y, i=i: y[i], found)
        assert equal(entry.results, jax.jit(call)(cotangents, *tensors, x).results)
        assert_table(entry.dbias, case, (*tensors, x), cotangents)
