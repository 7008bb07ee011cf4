"""jax_fa3.kv_cache.dot_product_attention against the oracle, over every kind of cache and call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kv_cases import E4M3, Case, Inputs, assert_right, run

import jax_fa3
from jax_fa3 import kv_cache
from jax_fa3.kv_cache import _xla

SINKS = np.linspace(-1, 2, 4)
RAGGED: Any = {"counts": (1, 17, 0, 1, 2, 40, 1), "lengths": (9, 17, 30, 0, 50, 64, 1)}
MIXED: Any = {**RAGGED, "ragged": True, "pages": 5}

TABLE = [
    Case("T 1, group 1, page 8", (1,) * 7, (0, 1, 7, 8, 9, 31, 32), 8, N=2),
    Case("T 2, group 7, page 64", (2,) * 5, (0, 2, 63, 65, 128), 64, N=7, K=1),
    Case("T 3, page 128", (3,) * 4, (3, 127, 129, 256), 128),
    Case("T 8, surplus pages", (8,) * 3, (8, 9, 24), 8, pages=7),
    Case("T 64, page 16", (64,) * 2, (64, 100)),
    Case("rows before the sequence", (3,) * 3, (1, 2, 5)),
    Case("rows before it, not causal", (3,) * 3, (1, 2, 5), options={"is_causal": False}),
    Case("window shorter than a page", (3,) * 3, (3, 17, 47), options={"local_window_size": (4, 0)}),
    Case("window on both sides", (3,) * 3, (3, 17, 47), options={"local_window_size": (4, 1), "is_causal": False}),
    Case("wide window", (3,) * 2, (3, 40), options={"local_window_size": 2**70}),
    Case("soft cap", (2,) * 2, (20, 3), options={"logits_soft_cap": 0.7, "scale": 0.9}),
    Case("sinks", (2,) * 3, (20, 3, 0), options={"sinks": SINKS}),
    Case("sinks, ragged", **MIXED, options={"sinks": SINKS, "local_window_size": 3}),
    Case("left padding", (2,) * 3, (20, 3, 9), options={"key_begin": [4, 2, -3]}),
    Case("intervals", (2,) * 2, (20, 9), options={"key_begin": [[4, 2], [9, 0]], "key_end": [[9, 30], [12, 5]], "is_causal": False}),
    Case("ragged, spare", **MIXED, spare=5),
    Case("ragged, T 1", (1,) * 4, (1, 3, 0, 20), ragged=True),
    Case("ragged intervals", (3, 1), (20, 9), ragged=True, options={"key_begin": [4, 2, 0, 1], "key_end": [9, 3, 10, 7]}),
    Case("ragged left padding", (3, 1), (20, 9), ragged=True, options={"key_begin": [4, 2]}),
    Case("HND, V 24", (2,) * 3, (3, 17, 40), V=24, layout="HND"),
    Case("interleaved", (2,) * 3, (3, 17, 40), layout="interleaved"),
    Case("lanes, V 24", (2,) * 3, (3, 17, 40), V=24, layout="lanes"),
    Case("contiguous", (2,) * 3, (3, 17, 40), pages=3, contiguous=True),
    Case("contiguous lanes, ragged", **MIXED, contiguous=True, spare=3, layout="lanes"),
    Case("page 5", (2,) * 3, (3, 17, 40), 5),
]  # fmt: skip
QUANTIZED = [
    Case("scalar", **MIXED, cache_dtype=E4M3, scales="scalar"),
    Case("heads", (2,) * 2, (20, 3), cache_dtype=E4M3, scales="heads", layout="interleaved"),
    Case("sequences", **MIXED, cache_dtype=E4M3, scales="sequences"),
    Case("tokens, HND", (2,) * 2, (20, 3), cache_dtype=E4M3, scales="tokens", layout="HND"),
    Case("tokens, lanes", (2,) * 2, (20, 3), cache_dtype=E4M3, scales="tokens", layout="lanes"),
]


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_table(case: Case):
    """In fp32; with strict promotion; NaN wherever nobody may look."""
    inputs = Inputs(case, jnp.float32)
    assert_right(inputs, run(inputs.arguments()))


@pytest.mark.parametrize("values", [(1, 0.3), (0, 1e-3), (0, 30), (0, 100), (-2, 0.1)])
@pytest.mark.parametrize("case", [c for c in TABLE if c.name in ("sinks, ragged", "HND, V 24")], ids=str)  # fmt: skip
def test_values_that_are_no_unit_normals(case: Case, values: tuple[float, float]):
    inputs = Inputs(dataclasses.replace(case, values=values), jnp.float32)
    assert_right(inputs, run(inputs.arguments()))


@pytest.mark.parametrize("split_size", [7])
@pytest.mark.parametrize("case", [c for c in TABLE if c.name in ("ragged, spare", "sinks")], ids=str)  # fmt: skip
def test_split_size(case: Case, split_size: int):
    inputs = Inputs(case, jnp.float32)
    assert_right(inputs, run({**inputs.arguments(), "split_size": split_size}))


@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_e4m3_caches(case: Case):
    inputs = Inputs(case, jnp.bfloat16)
    assert_right(inputs, run(inputs.arguments()), 2**-8)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_dtypes(dtype: str):
    case = Case("", **MIXED, scales="sequences")
    with jax.enable_x64(dtype == "float64"):
        inputs = Inputs(case, dtype)
        found = run(inputs.arguments())
        assert found[0].dtype == dtype
        assert found[1].dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        assert_right(inputs, found, 2e-6 if dtype == "float64" else float(jnp.finfo(dtype).eps))


def test_many_blocks(monkeypatch: pytest.MonkeyPatch):
    """Of positions, and groups of tiles."""
    monkeypatch.setattr(_xla, "BLOCK", 24)
    monkeypatch.setattr(_xla, "GROUP_NUMBERS", 2 * 24 * (2 * 32 + 4 * 16))
    inputs = Inputs(Case("", **{**MIXED, "pages": 9}, H=15), jnp.float32)  # compiled for no other
    assert_right(inputs, run(inputs.arguments()))


def test_split_size_makes_results_independent_of_the_batch():
    """Bit by bit: alone, among others, in other places, in ragged and rectangular calls."""
    case = Case("", (1, 3, 40, 1), (100, 60, 90, 77), ragged=True, pages=8)
    inputs = Inputs(case, jnp.float32)
    arguments = {**inputs.arguments(), "split_size": 32}
    out, lse = run(arguments)
    for order in ([1], [3, 2, 1, 0]):
        fewer, rows = inputs.chosen(arguments, order)
        found = run(fewer)
        np.testing.assert_array_equal(found[0], out[rows])
        np.testing.assert_array_equal(found[1], lse[rows])
        if len(order) == 1:
            fewer["query"] = fewer["query"][None]
            del fewer["query_starts"]
            np.testing.assert_array_equal(run(fewer)[0][0], out[rows])


def test_equals_the_training_function():
    """On a contiguous cache: the same masks by lengths and offsets."""
    case = Case(
        "", (5,) * 3, (5, 17, 48), pages=3, contiguous=True, options={"local_window_size": (9, 0)}
    )
    inputs = Inputs(case, jnp.float32)
    key, value = (jnp.nan_to_num(x[inputs.table[:, 0]]) for x in inputs.caches())
    lengths = np.array(case.lengths)
    query = inputs.arguments()["query"]
    found = kv_cache.dot_product_attention(query, key, value, lengths, local_window_size=(9, 0))
    wanted = jax_fa3.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=(9, 0), key_value_seq_lengths=lengths,
        query_offset=lengths - 5, implementation="xla",
    )  # fmt: skip
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
