"""jax_fa3.kv_cache.dot_product_attention with integers of every kind, mistakes, and JAX's modes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import temporary_bytes
from kv_cases import Case, Inputs, assert_right, run
from modes import compiled_in_third_call

from jax_fa3 import kv_cache

RAGGED: Any = {"counts": (1, 17, 0, 1, 2), "lengths": (9, 17, 30, 0, 50), "ragged": True}


@pytest.mark.parametrize("dtype", ["int8", "uint32", "uint64"])
def test_integers(dtype: str):
    """Of every dtype, and with values far beyond what they count."""
    case = Case("ragged", (2, 1), (20, 9), 8, ragged=True, spare=1)
    inputs = Inputs(case, jnp.float32)
    arguments = inputs.arguments()
    wide = np.iinfo(dtype).bits > 16
    with jax.enable_x64(wide):
        for name in ("key_value_seq_lengths", "page_table", "query_starts", "num_sequences"):
            limits = np.iinfo(dtype)
            x = np.clip(arguments[name], limits.min, min(limits.max, 2**63 - 1)).astype(dtype)
            arguments[name] = jnp.asarray(x)
        assert_right(inputs, run(arguments))


def test_python_integers():
    arguments = Inputs(Case("", (1, 1), (3, 2), 8), jnp.float32).arguments()
    for name in ("key_value_seq_lengths", "page_table"):
        arguments[name] = arguments[name].tolist()
    wanted = run(arguments)[0]
    assert np.isfinite(wanted).all()
    arguments["key_value_seq_lengths"] = [3, 2**70]
    found = run(arguments)[0]
    np.testing.assert_array_equal(found[0], wanted[0])
    assert np.isnan(found[1]).all()


MISTAKES: dict[str, tuple[str, Any, Any]] = {
    "length": ("key_value_seq_lengths", 1, 81),
    "negative page": ("page_table", (1, 0), -1),
    "page beyond": ("page_table", (1, 2), 10**6),
    "starts beyond": ("query_starts", 3, 10**6),
}


@pytest.mark.parametrize("name, ragged", [*((name, True) for name in MISTAKES), ("length", False)])
def test_mistakes(name: str, ragged: bool):
    """NaN in that sequence alone."""
    argument, place, value = MISTAKES[name]
    case = Case("", (2, 2, 2), (20, 40, 9), pages=5, ragged=ragged, spare=3 if ragged else 0)
    inputs = Inputs(case, jnp.float32)
    arguments = inputs.arguments()
    wanted = run(arguments)
    changed = np.array(arguments[argument])
    changed[place] = value
    found = run({**arguments, argument: changed})
    first = argument == "query_starts"  # it takes the spare rows as well
    for x, y in zip(found, wanted, strict=True):
        x, y = (
            np.asarray(z).reshape(-1, *(4, 16)[: y.ndim - (1 if ragged else 2)]) for z in (x, y)
        )
        rows = np.arange(len(x))
        bad = (rows >= 4) if first else np.isin(rows, [2, 3])
        assert np.isnan(x[bad]).all()
        np.testing.assert_array_equal(x[~bad], y[~bad])


def test_starts_that_go_back():
    """Whose rows are whose is not clear then: all are NaN, but for what is behind the last."""
    case = Case("", (2, 2, 2), (20, 40, 9), pages=5, ragged=True, spare=3)
    arguments = Inputs(case, jnp.float32).arguments()
    arguments["query_starts"][:4] = 0, 4, 2, 6
    out, _ = run(arguments)
    assert np.isnan(out[:6]).all()
    np.testing.assert_array_equal(out[6:], 0)


def test_mistakes_nobody_looks_at():
    """Pages before the window, behind the length, of idle slots."""
    case = Case("", (2, 2, 2), (20, 40, 0), 8, pages=6, options={"local_window_size": (9, 0)})
    inputs = Inputs(case, jnp.float32)
    arguments = inputs.arguments()
    table = arguments["page_table"]
    table[0, 0], table[1, :3] = -1, 10**6  # positions up to 9 - 1 and 29 - 1
    assert_right(inputs, run(arguments))
    table[1, 3] = 10**6
    assert np.isnan(run(arguments)[0][1]).all()


def test_cache_rows_that_do_not_exist():
    inputs = Inputs(Case("", (1, 1), (3, 5), contiguous=True), jnp.float32)
    arguments = inputs.arguments()
    good = run(arguments)
    for row in (-1, 5):
        arguments["cache_rows"] = np.array([arguments["cache_rows"][0], row])
        found = run(arguments)
        np.testing.assert_array_equal(found[0][0], good[0][0])
        assert np.isnan(found[0][1]).all() and np.isnan(found[1][1]).all()


def test_sequences_that_do_not_count():
    """In a rectangular call: 0, whatever is said of them; those that do are as without them."""
    case = Case("", (2, 2), (20, 40), pages=5)
    arguments = Inputs(case, jnp.float32).arguments()
    wanted = run(arguments)
    arguments["page_table"][1], arguments["key_value_seq_lengths"][1] = -1, 10**6
    for count, first in ((1, wanted[0][0]), (0, 0), (-3, 0)):
        out, lse = run({**arguments, "num_sequences": count})
        np.testing.assert_array_equal(out[0], first)
        np.testing.assert_array_equal(out[1], 0)
        np.testing.assert_array_equal(lse[1], -np.inf)
    assert np.isnan(run({**arguments, "num_sequences": 7})[0][1]).all()


def test_eager_calls_compile_once():
    arguments = Inputs(Case("", **RAGGED, spare=2), jnp.float32).arguments()
    assert compiled_in_third_call(lambda: run(arguments)) == 0


def test_nothing():
    """No sequences, no rows, no heads."""
    case = Case("", (2, 2), (20, 40), pages=5)
    arguments = Inputs(case, jnp.float32).arguments()
    none = {
        **arguments,
        "query": arguments["query"][:0],
        "key_value_seq_lengths": [],
        "page_table": np.zeros((0, 5), int),
    }
    assert run(none)[0].shape == (0, 2, 4, 16)
    assert run({**arguments, "query": arguments["query"][:, :0]})[1].shape == (2, 0, 4)
    no_heads = {**arguments, "query": arguments["query"][:, :, :0]}
    assert run(no_heads)[0].shape == (2, 2, 0, 16)


def test_memory_is_linear():
    """Neither scores of all positions, nor a gathered cache."""

    def call(query: Any, cache: Any, table: Any, lengths: Any) -> Any:
        return kv_cache.dot_product_attention(query, cache, cache, lengths, page_table=table)

    def bytes_of(pages: int) -> int:
        arrays = (1, 256, 4, 16), (pages, 64, 2, 16)
        query, cache = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arrays)
        table, lengths = (jax.ShapeDtypeStruct(x, jnp.int32) for x in ((1, pages), (1,)))
        return temporary_bytes(call, query, cache, table, lengths)

    short, long = bytes_of(64), bytes_of(1024)
    assert long < 2 * short and long < 64 * 2**20


def test_vmap():
    """Over pools, tables and queries."""
    many = [Inputs(Case("", (2, 2), (20, 9)), jnp.float32, seed) for seed in range(3)]
    arguments = [inputs.arguments() for inputs in many]
    names = "query", "key_cache", "value_cache", "key_value_seq_lengths", "page_table"
    stacked = {name: np.stack([x[name] for x in arguments]) for name in names}
    call = functools.partial(kv_cache.dot_product_attention, return_residual=True)
    found = jax.vmap(lambda x: call(**x))(jax.tree.map(jnp.asarray, stacked))
    for i, inputs in enumerate(many):
        assert_right(inputs, [x[i] for x in found])


@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd])
def test_has_no_derivative(derivative: Any):
    arguments = Inputs(Case("", (1, 1), (3, 2)), jnp.float32).arguments()

    def loss(query: Any) -> Any:
        return kv_cache.dot_product_attention(**{**arguments, "query": query}).sum()

    with pytest.raises(NotImplementedError, match=r"differentiate jax_fa3\.dot_product_attention"):
        derivative(loss)(arguments["query"])
    stopped = jax.grad(lambda x: x.sum() + loss(jax.lax.stop_gradient(x)))(arguments["query"])
    np.testing.assert_array_equal(stopped, 1)


def test_disable_jit():
    inputs = Inputs(Case("", **RAGGED, spare=2), jnp.float32)
    with jax.disable_jit():
        assert_right(inputs, run(inputs.arguments()))
