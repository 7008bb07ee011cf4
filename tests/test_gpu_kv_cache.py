"""The decoding kernel against the oracle in fp64, and against plain JAX in fp32 where that would take
long."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equal
from kv_cases import Case, Inputs, run
from test_kv_cache import TABLE
from test_kv_cache_modes import MISTAKES

pytestmark = pytest.mark.gpu
REFUSED = "page 5", "intervals", "ragged intervals"
WIDE = {"HND, V 24": 72, "lanes, V 24": 40}  # whose head dims are no kernel's
SMALL = [
    dataclasses.replace(x, H=64 if x.name not in WIDE else 80, V=WIDE.get(x.name))
    for x in TABLE
    if x.name not in REFUSED
]
PAGES = [
    Case(f"page {p}", (1,) * 7, (0, 1, p - 1, p, p + 1, 2 * p, 3 * p + 5), p, N=8, H=128, pages=4)
    for p in (8, 16, 24, 64, 128, 256)
]
ROWS = [Case(f"T {t}", (t,) * 3, (t, 130, 515), 16, N=8, H=128) for t in (2, 3, 8, 16, 64, 100)]
GROUPS = [Case(f"group {g}", (3,) * 3, (3, 70, 199), 64, N=2 * g, H=128) for g in (1, 7, 8, 16, 72)]
SPLIT = [
    Case("one long", (1,), (9000,), 64, N=8, H=128),
    Case("long, window", (2,) * 2, (3000, 700), 16, N=8, H=128, options={"local_window_size": 1500}),
    Case("contiguous, odd", (1,) * 3, (1001, 3, 500), 1001, N=8, H=128, pages=1, contiguous=True),
    Case("values of one sign", (1,) * 2, (3000, 700), N=8, H=128, values=(1, 0.3)),
    Case("small values", (1,) * 2, (3000, 700), N=8, H=128, values=(0, 1e-3)),
    Case("large values", (2,) * 2, (3000, 700), N=8, H=64, values=(0, 30)),
]  # fmt: skip


def assert_near(inputs: Inputs, found: Any, wanted: Any = None) -> None:
    """As near as weights and results that are rounded to the dtype can be sure to be."""
    case = inputs.case
    unit = float(jnp.finfo(inputs.dtype).eps) / 2
    out, lse = (np.asarray(x, np.float64) for x in found)
    out, lse = out.reshape(-1, *out.shape[-2:]), lse.reshape(-1, lse.shape[-1])
    np.testing.assert_array_equal(out[case.rows :], 0)
    np.testing.assert_array_equal(lse[case.rows :], -np.inf)
    exact_out, exact_lse = wanted or inputs.wanted()
    largest = np.nanmax(np.abs(inputs.value), initial=0)
    factor = 1 if case.options.get("logits_soft_cap") is None else 2
    norms = [np.nanmax(np.linalg.norm(x, axis=-1)) for x in (inputs.query, inputs.key)]
    of_score = 2.0**-22 * norms[0] * norms[1] * case.options.get("scale", case.H**-0.5)
    of_score += 0 if factor == 1 else 2.0**-10 * case.options["logits_soft_cap"]
    limit = (factor * 2.02 * unit + 2 * of_score) * largest
    np.testing.assert_allclose(out[: case.rows], exact_out, rtol=0, atol=limit)
    np.testing.assert_allclose(lse[: case.rows], exact_lse, rtol=4e-6, atol=4e-6 + of_score)


def kernel(inputs: Inputs, **options: Any) -> Any:
    return run({**inputs.arguments(), "implementation": "fa3", **options})


@pytest.mark.parametrize("case", [*SMALL, *PAGES, *ROWS, *GROUPS, *SPLIT], ids=str)
def test_table(case: Case):
    """With NaN wherever nobody may look, and the same bit by bit when it is run again."""
    inputs = Inputs(case, jnp.bfloat16)
    found = kernel(inputs)
    assert_near(inputs, found)
    assert equal(found, kernel(inputs))


@pytest.mark.parametrize("case", [SMALL[13], PAGES[1], ROWS[4], *SPLIT[:3]], ids=str)
def test_float16(case: Case):
    inputs = Inputs(case, jnp.float16)
    assert_near(inputs, kernel(inputs))


DIMS = [(64, 64), (72, 40), (96, 96), (128, 128), (128, 64), (192, 128), (192, 192), (256, 256)]


@pytest.mark.parametrize("dims", DIMS)
def test_head_dims(dims: tuple[int, int]):
    counts, lengths = (1, 17, 0, 1, 2, 40, 1), (9, 17, 30, 0, 50, 64, 700)
    case = Case("", counts, lengths, 16, N=8, H=dims[0], V=dims[1], ragged=True, spare=5)
    inputs = Inputs(case, jnp.bfloat16)
    assert_near(inputs, kernel(inputs))


@pytest.mark.parametrize("name, ragged", [*((name, True) for name in MISTAKES), ("length", False)])
@pytest.mark.parametrize("count", [2, 40])
def test_mistakes(name: str, ragged: bool, count: int):
    """NaN in that sequence alone, in all of its tiles."""
    argument, place, value = MISTAKES[name]
    case = Case("", (count,) * 3, (count, 80, 50), pages=5, H=64, ragged=ragged, spare=3 * ragged)
    inputs = Inputs(case, jnp.bfloat16)
    wanted = kernel(inputs)
    changed = np.array(inputs.arguments()[argument])
    changed[place] = value
    found = kernel(inputs, **{argument: changed})
    rows = np.arange(3 * count + 3 * ragged)
    bad = rows >= 2 * count if argument == "query_starts" else rows // count == 1
    for x, y in zip(found, wanted, strict=True):
        x, y = (np.asarray(z, np.float32).reshape(len(rows), -1) for z in (x, y))
        assert np.isnan(x[bad]).all()
        np.testing.assert_array_equal(x[~bad], y[~bad])


def test_starts_that_go_back():
    case = Case("", (2, 2, 2), (20, 40, 9), pages=5, H=64, ragged=True, spare=3)
    inputs = Inputs(case, jnp.bfloat16)
    starts = inputs.where()["query_starts"]
    starts[:4] = 0, 4, 2, 6
    out, lse = kernel(inputs, query_starts=starts)
    assert np.isnan(np.asarray(out[:6], np.float32)).all() and np.isnan(lse[:6]).all()
    assert not np.asarray(out[6:], np.float32).any() and (np.asarray(lse[6:]) == -np.inf).all()


@pytest.mark.parametrize("dim", [64, 128])
def test_split_size_makes_results_independent_of_the_batch(dim: int):
    """Bit by bit: alone, among others, in other places, in ragged and rectangular calls, by tiles of
    either height."""
    case = Case("", (1, 3, 40, 1), (3000, 600, 900, 77), 16, N=8, H=dim, ragged=True)
    inputs = Inputs(case, jnp.bfloat16)
    arguments = {**inputs.arguments(), "split_size": 256, "implementation": "fa3"}
    out, lse = run(arguments)
    assert_near(inputs, (out, lse))
    for order in ([0], [1], [2], [3, 2, 1, 0], [0] * 300):
        fewer, rows = inputs.chosen(arguments, order)
        assert equal(run(fewer), (out[rows], lse[rows]))
        if len(set(order)) == 1:
            fewer["query"] = fewer["query"].reshape(len(order), -1, 8, dim)
            del fewer["query_starts"]
            found = (x.reshape(-1, *x.shape[2:]) for x in run(fewer))
            assert equal(tuple(found), (out[rows], lse[rows]))


@pytest.mark.parametrize("case", [SMALL[9], SMALL[11], ROWS[3], ROWS[5], *SPLIT[:3]], ids=str)
def test_split_size(case: Case):
    inputs = Inputs(case, jnp.bfloat16)
    found = kernel(inputs, split_size=128)
    assert_near(inputs, found)
    assert equal(found, kernel(inputs, split_size=128))


MIXES: dict[str, Any] = {
    "77 x (2048, 1)": [(2048, 1)] * 77,
    "100 x (1024, 1), 8 x (8192, 17)": [(1024, 1)] * 100 + [(8192, 17)] * 8,
    "99 x (766, 2), (1024, 512)": [(766, 2)] * 99 + [(1024, 512)],
    "(8190, 1939)": [(8190, 1939)],
    "T 1000": [(0, 1000), (3000, 1000)],
}


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("name", MIXES)
def test_mixes(name: str, window: int | None):
    """Of (cached, new); and by themselves sequences have the same but for rounding."""
    new = np.array([q for _, q in MIXES[name]])
    lengths = np.array([sum(x) for x in MIXES[name]])
    page, heads, kv_heads, dim = 16, 8, 2, 128
    width = -(-lengths.max() // page)
    rng = np.random.default_rng(0)
    owned = -(-lengths // page)
    total = int(owned.sum())
    table = np.full((len(lengths), width), -1)
    order, used = rng.permutation(total), np.cumsum([0, *owned])
    for b in range(len(lengths)):
        table[b, : owned[b]] = order[used[b] : used[b + 1]]
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (int(new.sum()), heads, dim), jnp.bfloat16)
    caches = [jax.random.normal(k, (total, page, kv_heads, dim), jnp.bfloat16) for k in keys[1:]]
    where: Any = {"page_table": table, "query_starts": np.cumsum([0, *new])}
    where |= {"key_value_seq_lengths": lengths, "local_window_size": window}
    found = run({"query": query, **_caches(caches), **where, "implementation": "fa3"})
    wide = [x.astype(jnp.float32) for x in (query, *caches)]
    with jax.default_matmul_precision("highest"):
        wanted = run({"query": wide[0], **_caches(wide[1:]), **where, "implementation": "xla"})
    out, exact = (np.asarray(x[0], np.float32) for x in (found, wanted))
    np.testing.assert_allclose(out, exact, rtol=2**-8, atol=2**-8)
    np.testing.assert_allclose(found[1], wanted[1], rtol=4e-6, atol=1e-5)


def _caches(caches: Any) -> dict[str, Any]:
    return dict(zip(("key_cache", "value_cache"), caches, strict=True))


def test_in_a_graph_with_other_lengths():
    """One compiled program; nothing of a schedule is kept."""
    case = Case("", (1,) * 4, (900, 30, 1, 0), 16, N=8, H=128)
    inputs = Inputs(case, jnp.bfloat16)
    lengths = inputs.where()["key_value_seq_lengths"]
    call = jax.jit(lambda x: kernel(inputs, key_value_seq_lengths=x))
    for other in ((900, 30, 1, 0), (3, 30, 1, 0), (0, 0, 0, 0), (880, 1, 1, 0)):
        shorter = dataclasses.replace(case, lengths=other)
        wanted = Inputs.__new__(Inputs)
        wanted.__dict__.update(inputs.__dict__, case=shorter)
        found = call(np.minimum(np.array(other), lengths))
        assert_near(wanted, found)
