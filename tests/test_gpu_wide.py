"""The kernels of heads wider than 256, on a Hopper GPU: the forward and the gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CAUSAL, TABLE, Case
from helpers import (
    ROWS,
    Results,
    assert_rounded,
    beside_fp64,
    both_oracles,
    equal,
    poison,
    with_gradients,
)
from long_cases import LONG
from masks import ints, key_lengths

import jax_fa3

pytestmark = pytest.mark.gpu

DIMS = [(512, 512), (576, 512), (64, 512), (264, 264), (320, 512), (512, 264), (40, 504)]
NAMES = [
    "1x1",
    "129x127",
    "255x128",
    "2x129",
    "K = 1",
    "groups of 3",
    "T = 0",
    "S = 0",
    "soft cap",
    "soft cap, scale, window",
    "soft cap, lengths",
    "rows see nothing at first",
    "rows see nothing at last",
    "rows see nothing at all",
    "array offset, window",
    "key lengths",
    "both lengths, window",
    "planted, full",
    "planted, causal",
    "planted, window",
    "planted, all keys",
    "documents, causal",
    "documents, padding",
    "documents, broken run",
    "any intervals",
    "everything",
    "soft cap, documents",
]
CASES = {case.name: case for case in [*TABLE, *LONG]}
attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)
oracles = jax.jit(both_oracles, static_argnums=(0, 1))


def check(case: Case, dtype: Any, inputs: Any = None) -> None:
    inputs = case.inputs(dtype) if inputs is None else inputs
    poison(case, dtype)
    found = Results(*jax.jit(functools.partial(attention, **case.arguments))(*inputs))
    assert found.out.dtype == dtype and found.lse.dtype == jnp.float32
    exact, rounded = oracles(case, dtype, inputs)
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)


def wide(case: Case, dims: tuple[int, int]) -> Case:
    return dataclasses.replace(case, name=f"{case.name}, {dims}", H=dims[0], V=dims[1])


@pytest.mark.parametrize(("index", "name"), list(enumerate(NAMES)), ids=NAMES)
def test_table(index: int, name: str):
    """The head dims in turn."""
    dtype = (jnp.bfloat16, jnp.float16)[index % 2]
    check(wide(CASES[name], DIMS[index % 3]), dtype)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(dims: tuple[int, int]):
    check(Case(f"{dims}", 150, 300, 4, 2, *dims, B=1, mask=CAUSAL), jnp.bfloat16)
    check(Case(f"{dims} sinks", 300, 150, 2, 1, *dims, B=1, sinks=(0.5, -2.0)), jnp.float16)


@pytest.mark.parametrize("dims", DIMS[:3], ids=str)
def test_long(dims: tuple[int, int]):
    """Every stage of the ring many times, with masks that end in any of them."""
    check(Case(f"long {dims}", 1000, 2100, 2, 1, *dims, B=1), jnp.bfloat16)
    mask = {"local_window_size": (700, 90), **key_lengths(1777, 900)}
    check(Case(f"long window {dims}", 1500, 2000, 2, 2, *dims, mask=mask), jnp.bfloat16)


@pytest.mark.parametrize("values", ["mean", "1e-3", "30"])
def test_values(values: str):
    change = {"mean": lambda x: 1 + 0.3 * x, "1e-3": lambda x: 1e-3 * x, "30": lambda x: 30 * x}
    case = Case(f"wide {values}", 300, 333, 4, 2, 512, mask=CAUSAL)
    query, key, value = (x.astype(jnp.float32) for x in case.inputs(jnp.bfloat16))
    query, key = (change[values](x) for x in (query, key))
    inputs = tuple(x.astype(jnp.bfloat16) for x in (query, key, value))
    found = Results(*jax.jit(functools.partial(attention, **case.arguments))(*inputs))
    exact, rounded = oracles(case, jnp.bfloat16, inputs)
    rows = ROWS
    if values == "30":  # fp32 has not digits enough for such scores
        cotangents = case.cotangents(jnp.bfloat16)
        exact, rounded = oracles(case, jnp.bfloat16, inputs, cotangents)
        exact, rounded = beside_fp64(case, exact, rounded, cotangents, inputs)
        exact, rounded = (Results(x.out, x.lse) for x in (exact, rounded))
        rows = case.T
    assert_rounded(found, exact, rounded, case, jnp.finfo(jnp.bfloat16).eps, rows)


def test_bit_equal():
    """Whatever stood in the results' memory before, with many clusters at a time."""
    case = Case("wide, many", 1024, 1024, 8, 2, 512, mask=CAUSAL, B=4)
    inputs = case.inputs(jnp.bfloat16)
    call = jax.jit(functools.partial(attention, **case.arguments))
    first = call(*inputs)
    for _ in range(50):
        poison(case, jnp.bfloat16)
        assert equal(first, call(*inputs))


def test_packed():
    query, key, value = Case("wide packed", 300, 300, 4, 2, 512).inputs(jnp.bfloat16)
    qkv = jnp.concatenate([query, key, value], axis=2)
    found = jax_fa3.qkv_dot_product_attention(qkv, 2, is_causal=True, implementation="fa3")
    assert equal(found, attention(query, key, value, is_causal=True)[0])


def gradients(case: Case, **options: Any) -> Any:
    """A jitted function of cotangents and inputs to Results."""
    call = functools.partial(attention, **case.arguments, **options)
    return jax.jit(functools.partial(with_gradients, call))


def check_gradients(case: Case, dtype: Any, change: Any = None) -> None:
    inputs, cotangents = case.inputs(dtype), case.cotangents(dtype)
    if change is not None:
        inputs = tuple(change(x.astype(jnp.float32)).astype(dtype) for x in inputs)
    for _ in range(3):
        poison(case, dtype)
    found = gradients(case)(cotangents, *inputs)
    exact, rounded = oracles(case, dtype, inputs, cotangents)
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)


WITH_GRADIENT = [(512, 512), (64, 512), (320, 264)]


@pytest.mark.parametrize(("index", "name"), list(enumerate(NAMES)), ids=NAMES)
def test_gradients_of_table(index: int, name: str):
    """The head dims in turn."""
    dtype = (jnp.float16, jnp.bfloat16)[index % 2]
    check_gradients(wide(CASES[name], WITH_GRADIENT[index % 3]), dtype)


@pytest.mark.parametrize("dims", [x for x in DIMS if x[0] <= 512], ids=str)
def test_gradients_of_head_dims(dims: tuple[int, int]):
    check_gradients(Case(f"{dims}", 150, 300, 4, 2, *dims, B=1, mask=CAUSAL), jnp.bfloat16)


def test_long_gradients():
    """Every stage of the rings many times; several heads of a group, with all kinds of steps."""
    check_gradients(Case("long wide", 1000, 1100, 2, 1, 512, B=1), jnp.bfloat16)
    mask = {"local_window_size": (700, 90), **key_lengths(1777, 900)}
    check_gradients(Case("long wide window", 1500, 2000, 2, 2, 512, mask=mask), jnp.bfloat16)
    case = Case("long wide MQA", 1111, 999, 8, 1, 512, B=1, mask=CAUSAL)  # in parts
    check_gradients(case, jnp.float16)


@pytest.mark.parametrize("values", ["mean", "1e-3", "30"])
def test_gradients_of_values(values: str):
    change = {"mean": lambda x: 1 + 0.3 * x, "1e-3": lambda x: 1e-3 * x, "30": lambda x: 30 * x}
    case = Case(f"wide gradients {values}", 300, 333, 4, 2, 512, mask=CAUSAL)
    if values != "30":
        return check_gradients(case, jnp.bfloat16, change[values])
    *scaled, value = (x.astype(jnp.float32) for x in case.inputs(jnp.bfloat16))
    inputs = tuple(x.astype(jnp.bfloat16) for x in (*map(change[values], scaled), value))
    cotangents = case.cotangents(jnp.bfloat16)
    found = gradients(case)(cotangents, *inputs)
    exact, rounded = oracles(case, jnp.bfloat16, inputs, cotangents)
    exact, rounded = beside_fp64(case, exact, rounded, cotangents, inputs)
    assert_rounded(found, exact, rounded, case, jnp.finfo(jnp.bfloat16).eps, case.T)


def test_gradients_of_sinks():
    case = Case("wide sinks", 300, 150, 2, 1, 512, B=1, sinks=(0.5, -2.0), mask=CAUSAL)
    check_gradients(case, jnp.bfloat16)


def test_bit_equal_gradients():
    """They are deterministic whatever is asked for; with more clusters than run at a time."""
    case = Case("wide gradients, many", 1024, 1024, 8, 2, 512, mask=CAUSAL, B=4)
    arguments = case.cotangents(jnp.bfloat16), *case.inputs(jnp.bfloat16)
    first = gradients(case)(*arguments)
    call = gradients(case, deterministic_backward=True)
    for _ in range(50):
        poison(case, jnp.bfloat16)
        assert equal(first, call(*arguments))


def test_packed_gradients():
    query, key, value = Case("wide packed", 300, 300, 4, 2, 512).inputs(jnp.bfloat16)

    def of_packed(qkv: Any) -> Any:
        return jax_fa3.qkv_dot_product_attention(qkv, 2, is_causal=True, implementation="fa3")

    def of_three(*qkv: Any) -> Any:
        return attention(*qkv, is_causal=True)[0]

    qkv = jnp.concatenate([query, key, value], axis=2)
    out, pullback = jax.vjp(of_packed, qkv)
    grads = jax.vjp(of_three, query, key, value)[1](out)
    assert equal(pullback(out)[0], jnp.concatenate(grads, axis=2))


def test_gradients_of_the_widest_are_of_xla():
    """With a warning, under implementation=None; refused for "fa3"."""
    case = Case("widest", 200, 260, 4, 2, 576, 512, mask={"is_causal": True, **LENGTHS})
    inputs, cotangents = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    with pytest.warns(UserWarning, match=r"runs this on XLA. query: got a gradient at head dims"):
        found = gradients(case, implementation=None)(cotangents, *inputs)
    exact, rounded = oracles(case, jnp.bfloat16, inputs, cotangents)
    assert_rounded(found, exact, rounded, case, 2**-7)
    with pytest.raises(NotImplementedError, match="query: got a gradient at head dims"):
        gradients(case)(cotangents, *inputs)


LENGTHS = {"query_seq_lengths": ints(130, 200), "key_value_seq_lengths": ints(129, 63)}
