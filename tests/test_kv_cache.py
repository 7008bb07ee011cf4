"""jax_fa3.kv_cache.dot_product_attention against the oracle, over every kind of cache and call."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kv_cases import E4M3, Case, Inputs
from modes import strict

import jax_fa3
from jax_fa3 import kv_cache

SINKS = np.linspace(-1, 2, 4)
RAGGED: Any = {"counts": (1, 17, 0, 1, 2, 40, 1), "lengths": (9, 17, 30, 0, 50, 64, 1)}
MIXED: Any = {**RAGGED, "ragged": True, "pages": 5}

TABLE = [
    Case("T 1, group 1, page 8", (1,) * 7, (0, 1, 7, 8, 9, 31, 32), 8, N=2),
    Case("T 1, group 4, page 64", (1,) * 4, (1, 63, 65, 128), 64, N=4, K=1),
    Case("T 2, group 7, page 16", (2,) * 5, (0, 2, 15, 17, 32), N=14),
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
    Case("ragged", **MIXED),
    Case("ragged, spare", **MIXED, spare=5),
    Case("ragged, T 1", (1,) * 4, (1, 3, 0, 20), ragged=True),
    Case("ragged intervals", (3, 1), (20, 9), ragged=True, options={"key_begin": [4, 2, 0, 1], "key_end": [9, 3, 10, 7]}),
    Case("ragged left padding", (3, 1), (20, 9), ragged=True, options={"key_begin": [4, 2]}),
    Case("HND, V 24", (2,) * 3, (3, 17, 40), V=24, layout="HND"),
    Case("interleaved", (2,) * 3, (3, 17, 40), layout="interleaved"),
    Case("lanes, V 24", (2,) * 3, (3, 17, 40), V=24, layout="lanes"),
    Case("contiguous", (2,) * 3, (3, 17, 40), pages=3, contiguous=True),
    Case("contiguous HND, V 8", (2,) * 3, (3, 17, 40), V=8, pages=3, contiguous=True, layout="HND"),
    Case("contiguous lanes, ragged", **MIXED, contiguous=True, spare=3, layout="lanes"),
    Case("page 5", (2,) * 3, (3, 17, 40), 5),
]  # fmt: skip
QUANTIZED = [
    Case("no scale", (2,) * 2, (20, 3), cache_dtype=E4M3),
    Case("scalar", **MIXED, cache_dtype=E4M3, scales="scalar"),
    Case("heads", (2,) * 2, (20, 3), cache_dtype=E4M3, scales="heads", layout="interleaved"),
    Case("sequences", **MIXED, cache_dtype=E4M3, scales="sequences"),
    Case("tokens", (2,) * 2, (20, 3), cache_dtype=E4M3, scales="tokens"),
    Case("tokens, HND", (2,) * 2, (20, 3), cache_dtype=E4M3, scales="tokens", layout="HND"),
    Case("tokens, lanes", (2,) * 2, (20, 3), cache_dtype=E4M3, scales="tokens", layout="lanes"),
]


def assert_right(inputs: Inputs, found: Any, eps: float = 2e-6) -> None:
    """Within a few units in the last place; rows outside of all sequences are 0 and -inf."""
    case = inputs.case
    out, lse = (np.asarray(x, np.float64) for x in found)
    out, lse = out.reshape(-1, *out.shape[-2:]), lse.reshape(-1, lse.shape[-1])
    np.testing.assert_array_equal(out[case.rows :], 0)
    np.testing.assert_array_equal(lse[case.rows :], -np.inf)
    wanted = inputs.wanted()
    np.testing.assert_allclose(out[: case.rows], wanted[0], rtol=eps, atol=2 * eps)
    np.testing.assert_allclose(lse[: case.rows], wanted[1], rtol=2e-6, atol=4e-6)


def run(arguments: dict[str, Any]) -> Any:
    with strict():
        return kv_cache.dot_product_attention(**arguments, return_residual=True)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_table(case: Case):
    """In fp32; with strict promotion; NaN wherever nobody may look."""
    inputs = Inputs(case, jnp.float32)
    assert_right(inputs, run(inputs.arguments()))


@pytest.mark.parametrize("split_size", [7, 16])
@pytest.mark.parametrize("case", [c for c in TABLE if c.name in ("ragged, spare", "sinks", "T 8, surplus pages")], ids=str)  # fmt: skip
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
    from jax_fa3.kv_cache import _xla

    monkeypatch.setattr(_xla, "BLOCK", 24)
    monkeypatch.setattr(_xla, "GROUP_NUMBERS", 2 * 24 * (2 * 32 + 4 * 16))
    inputs = Inputs(Case("", **{**MIXED, "pages": 9}, H=15), jnp.float32)  # compiled for no other
    assert_right(inputs, run(inputs.arguments()))


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int64", "uint64"])
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


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, ragged: bool):
    """NaN in that sequence alone."""
    argument, place, value = MISTAKES[name]
    if argument == "query_starts" and not ragged:
        pytest.skip("has none")
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


def test_split_size_makes_results_independent_of_the_batch():
    """Bit by bit: alone, among others, in other places, in ragged and rectangular calls."""
    case = Case("", (1, 3, 40, 1), (100, 60, 90, 77), ragged=True, pages=8)
    inputs = Inputs(case, jnp.float32)
    arguments = {**inputs.arguments(), "split_size": 32}
    out, lse = run(arguments)
    starts = np.cumsum([0, *case.counts])
    for order in ([1], [3, 2, 1, 0], [2, 0]):
        rows = np.concatenate([np.arange(starts[b], starts[b + 1]) for b in order])
        fewer = {
            **arguments,
            "query": arguments["query"][rows],
            "page_table": inputs.table[order],
            "key_value_seq_lengths": np.array(case.lengths)[order],
            "query_starts": np.cumsum([0, *(case.counts[b] for b in order)]),
        }
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


def test_memory_is_linear():
    """Neither scores of all positions, nor a gathered cache."""
    from helpers import temporary_bytes

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
    inputs = Inputs(TABLE[17], jnp.float32)
    with jax.disable_jit():
        assert_right(inputs, run(inputs.arguments()))
