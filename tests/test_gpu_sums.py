"""Sums over very many keys and rows, and over several CTAs, on a Hopper GPU."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, Case
from helpers import assert_rounded, both_oracles, with_gradients
from jax import Array
from masks import documents, packed

import jax_fa3

pytestmark = pytest.mark.gpu

attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)
oracles = jax.jit(both_oracles, static_argnums=(0, 1))


@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_long_sums_of_out(head_dim: int):
    """1,048,576 equal keys: at most 0.3 % low."""
    keys = 2**20
    query = jnp.zeros((1, 300, 1, head_dim), jnp.bfloat16)
    key = jax.random.normal(jax.random.key(1), (1, keys, 1, head_dim), jnp.bfloat16)
    value = jnp.ones_like(key)
    found, lse = attention(query, key, value)
    error = np.abs(np.asarray(found, np.float64) - 1).max()
    assert error <= 3e-3, error
    np.testing.assert_allclose(np.asarray(lse), math.log(keys), rtol=1e-5)
    # With weights that differ, and a maximum that comes late and early.
    query = jax.random.normal(jax.random.key(2), query.shape, jnp.bfloat16)
    value = (1 + 0.3 * jax.random.normal(jax.random.key(3), key.shape)).astype(jnp.bfloat16)
    found, lse = attention(query, key, value)
    wanted, wanted_lse = attention(query, key, value, implementation="xla")
    error = np.abs(np.asarray(found, np.float64) - np.asarray(wanted, np.float64)).max()
    assert error <= 8e-3, error  # 2^-7 is bf16's unit of out
    np.testing.assert_allclose(np.asarray(lse), np.asarray(wanted_lse), rtol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_long_sums_of_dk_and_dv(head_dim: int):
    """8 query heads of 1,048,576 rows each on one key/value head: 8,388,608 terms of one sign."""
    rows, keys = 2**20, 70
    query = jnp.ones((1, rows, 8, head_dim), jnp.bfloat16)
    key = jnp.zeros((1, keys, 1, head_dim), jnp.bfloat16)
    value = jnp.arange(keys, dtype=jnp.bfloat16)[None, :, None, None] + jnp.zeros_like(key)
    call = functools.partial(jax_fa3.dot_product_attention, implementation="fa3")

    @jax.jit
    def gradients(*inputs: Array) -> Any:
        _, pullback = jax.vjp(call, *inputs)
        return pullback(jnp.full(inputs[0].shape, 2.0**-20, jnp.bfloat16))[1:]

    dk, dv = (np.asarray(x, np.float64)[0, :, 0] for x in gradients(query, key, value))
    np.testing.assert_allclose(dv, 8 / keys, rtol=1e-3 + 2**-9)
    # dS = P (dP - delta), with dP = sum of dout * value and delta its mean.
    levels = np.asarray(value, np.float64)[0, :, 0, 0]
    exact = 8 * head_dim / keys * (levels - levels.mean()) / math.sqrt(head_dim)
    np.testing.assert_allclose(dk[:, 0], exact, rtol=1e-3 + 2**-9, atol=2e-3 * np.abs(exact).max())


KEYS = {
    "of keys": {"T": 300, "S": 1500, "N": 4, "K": 2, "B": 2},
    "of one row": {"T": 1, "S": 1000, "N": 2, "K": 1, "B": 1},
    "with a soft cap": {"T": 65, "S": 900, "N": 3, "K": 1, "B": 2, "logits_soft_cap": 4.0},
}


@pytest.mark.parametrize(
    "head_dim",
    [(64, 64), (72, 72), (96, 40), (128, 128), (192, 128), (192, 192), (256, 256)],
    ids=str,
)
@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("splits", [2, 3, 7, 20])
def test_splits_of_keys(splits: int, name: str, head_dim: tuple[int, int], monkeypatch: Any):
    """Over CTAs, whatever the plan would say; more than there are blocks, too."""
    monkeypatch.setattr("jax_fa3._plan.key_splits", lambda *_: splits)
    h, v = head_dim
    case = Case(f"split {name}", H=h, V=v, **KEYS[name])
    inputs, cotangents = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    jax.clear_caches()
    gradients = jax.jit(
        functools.partial(with_gradients, functools.partial(attention, **case.arguments))
    )
    found = gradients(cotangents, *inputs)
    exact, rounded = oracles(case, jnp.bfloat16, inputs, cotangents)
    assert_rounded(found, exact, rounded, case, jnp.finfo(jnp.bfloat16).eps)
    for x, y in zip(found[:2], gradients(cotangents, *inputs)[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("values", ["means", "small", "large"])
def test_values_of_shared_keys(values: str, head_dim: int):
    """As many CTAs share them as the plan says, several here."""
    case = Case(f"shared {values}", 100, 6001, 4, 2, H=head_dim, B=1)
    change: Any = {
        "means": lambda x: 1 + 0.3 * x, "small": lambda x: 1e-3 * x, "large": lambda x: 30 * x,
    }[values]  # fmt: skip
    inputs = tuple(map(change, case.inputs(jnp.bfloat16)))
    cotangents = case.cotangents(jnp.bfloat16)
    call = functools.partial(with_gradients, functools.partial(attention, **case.arguments))
    exact, rounded = oracles(case, jnp.bfloat16, inputs, cotangents)
    found = jax.jit(call)(cotangents, *inputs)
    assert_rounded(found, exact, rounded, case, jnp.finfo(jnp.bfloat16).eps)


SPLITS = {
    "heads": {"T": 1500, "S": 1500, "N": 8, "K": 1, "B": 1, "mask": CAUSAL},
    "uneven heads": {"T": 900, "S": 700, "N": 7, "K": 1, "B": 1, "mask": CAUSAL},
    "rows": {"T": 4000, "S": 77, "N": 2, "K": 2, "B": 2},
    "rows of groups": {
        "T": 3000,
        "S": 200,
        "N": 6,
        "K": 2,
        "B": 1,
        "mask": {"local_window_size": (700, 9)},
    },
    "packed": {
        "T": 2000,
        "S": 2000,
        "N": 8,
        "K": 1,
        "B": 1,
        "mask": {**packed(documents(700, 300, 1000)), **CAUSAL},
    },
    "rows that see nothing": {
        "T": 2000,
        "S": 100,
        "N": 4,
        "K": 1,
        "B": 1,
        "mask": {"is_causal": True, "query_offset": -1000},
    },
}


@pytest.mark.parametrize(
    "head_dim",
    [(64, 64), (80, 80), (128, 128), (192, 128), (192, 192), (256, 256)],
    ids=str,
)
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("splits", [0, 1, 2, 3, 5, 12])
def test_splits(splits: int, name: str, head_dim: tuple[int, int], monkeypatch: Any):
    """Of the query rows of a block of keys, over CTAs, whatever the plan would say."""
    monkeypatch.setattr("jax_fa3._plan.splits", lambda *_: splits)
    h, v = head_dim
    case = Case(f"split {name}", H=h, V=v, **SPLITS[name])
    inputs, cotangents = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    jax.clear_caches()
    call = functools.partial(attention, **case.arguments)
    gradients = jax.jit(functools.partial(with_gradients, call))
    found = gradients(cotangents, *inputs)
    exact, rounded = oracles(case, jnp.bfloat16, inputs, cotangents)
    assert_rounded(found, exact, rounded, case, jnp.finfo(jnp.bfloat16).eps)
    again = gradients(cotangents, *inputs)
    for x, y in zip(found[3:], again[3:], strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
