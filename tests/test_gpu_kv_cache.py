"""The decoding kernel against the oracle in fp64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equal
from kv_cases import Case, Inputs, run
from kv_gpu import assert_near, exact, twice
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
# Whose tiles are shared by clusters, of 16, 8 and 4 CTAs.
ONE: Any = {"N": 32, "K": 8, "H": 128}
FEW_TILES = [
    *(Case(f"one of {s}", (1,), (s,), 64, **ONE) for s in (1, 64, 1000, 5000)),
    Case("one, T 2, page 16", (2,), (333,), 16, **ONE),
    Case("one, window", (2,), (3000,), 64, **ONE, options={"local_window_size": 700}),
    Case("one, sinks", (1,), (700,), 64, **ONE, options={"sinks": np.linspace(-1, 2, 32), "key_begin": [70]}),
    Case("one, large values", (1,), (3000,), 64, N=8, K=8, H=64, values=(0, 30)),
    Case("one, 16 KV heads", (1,), (900,), 64, N=32, K=16, H=192, V=128),
    Case("two, 32 KV heads in all", (1, 1), (700, 33), 16, N=32, K=16, H=96),
    Case("contiguous, four", (1,) * 4, (100, 0, 2000, 7), 2000, N=32, K=8, H=128, pages=1, contiguous=True),
]  # fmt: skip

# Tiles with about as much to do: by 33, 6, 4, 2 and 1 CTAs, or several for each; and nearly such.
EQUAL = [
    Case("equal, one", (1,), (9000,), 64, **ONE),
    Case("equal, one, short", (1,), (200,), 64, pages=150, **ONE),
    Case("equal, one, few parts", (1,), (1000,), 64, pages=150, **ONE),
    Case("equal, five", (1,) * 5, (1000, 1040, 970, 1000, 1003), 64, pages=90, **ONE),
    Case("equal, five, window", (2,) * 5, (1000, 936, 744, 1960, 296), 64, pages=90, **ONE, options={"local_window_size": 200}),
    Case("equal, idle", (1,) * 5, (0,) * 5, 64, pages=90, **ONE),
    Case("equal, sinks", (1,) * 8, (700,) * 8, 16, pages=360, **ONE, options={"sinks": np.linspace(-1, 2, 32), "key_begin": [70] * 8}),
    Case("equal, T 4", (4,) * 8, (700,) * 8, 64, pages=90, **ONE),
    Case("equal, T 16", (16,) * 8, (700,) * 8, 64, pages=90, **ONE),
    Case("equal, T 24", (24,) * 4, (700,) * 4, 64, pages=90, **ONE),
    Case("equal, 128 tiles", (1,) * 16, (300,) * 16, 64, pages=90, N=16, K=8, H=64),
    Case("equal, 256 tiles", (1,) * 32, (130,) * 32, 64, pages=90, N=16, K=8, H=64),
    Case("equal, 1280 tiles, window", (1,) * 160, tuple(150 + i % 100 for i in range(160)), 16, N=16, K=8, H=64, options={"local_window_size": 128}),
    Case("nearly equal", (1,) * 5, (1000, 1040, 970, 1000, 1200), 64, pages=90, **ONE),
]  # fmt: skip


def kernel(inputs: Inputs, **options: Any) -> Any:
    return run({**inputs.arguments(), "implementation": "fa3", **options})


ALL = [*SMALL, *PAGES, *ROWS, *GROUPS, *SPLIT, *FEW_TILES, *EQUAL]
IN_FLOAT16 = [SMALL[13], PAGES[1], ROWS[4], *SPLIT[:3], FEW_TILES[2], EQUAL[2]]


@functools.cache
def in_table(dtype: Any) -> dict[str, Any]:
    return twice(ALL if dtype == jnp.bfloat16 else IN_FLOAT16, dtype)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_table(case: Case):
    """With NaN wherever nobody may look, and the same bit by bit when it is run again."""
    inputs, found, again = in_table(jnp.bfloat16)[str(case)]
    assert_near(inputs, found)
    assert equal(found, again)


@pytest.mark.parametrize("case", IN_FLOAT16, ids=str)
def test_float16(case: Case):
    inputs, found, _ = in_table(jnp.float16)[str(case)]
    assert_near(inputs, found)


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


@pytest.mark.parametrize("pages", [63, 1000])
@pytest.mark.parametrize("name", ["length", "page"])
def test_mistakes_of_shared_tiles(name: str, pages: int):
    """A page is missing in one CTA's part: of a cluster, or of those that share a tile in memory."""
    inputs = Inputs(Case("", (1,), (1000,), 16, pages=pages, **ONE), jnp.bfloat16)
    changed = dict(inputs.arguments(), implementation="fa3")
    if name == "length":
        changed["key_value_seq_lengths"] = np.array([10**6])
    else:
        changed["page_table"] = np.array(changed["page_table"])
        changed["page_table"][0, 40] = -1
    assert all(np.isnan(np.asarray(x, np.float32)).all() for x in run(changed))


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
    found = kernel(inputs, split_size=256)
    assert_near(inputs, found)
    assert equal(found, kernel(inputs, split_size=256))


MIXES: dict[str, Any] = {
    "77 x (2048, 1)": [(2048, 1)] * 77,
    "100 x (1024, 1), 8 x (8192, 17)": [(1024, 1)] * 100 + [(8192, 17)] * 8,
    "99 x (766, 2), (1024, 512)": [(766, 2)] * 99 + [(1024, 512)],
    "(8190, 1939)": [(8190, 1939)],
    "T 1000": [(0, 1000), (3000, 1000)],
    "64 x (4096, 2)": [(4096, 2)] * 64,
}


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("name", MIXES)
def test_mixes(name: str, window: int | None):
    """Of (cached, new). Of long prompts a seventh of the rows are compared, and those at the ends."""
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
    query = np.asarray(jax.random.normal(keys[0], (int(new.sum()), heads, dim), jnp.bfloat16))
    caches = [jax.random.normal(k, (total, page, kv_heads, dim), jnp.bfloat16) for k in keys[1:]]
    where: Any = {"page_table": table, "query_starts": np.cumsum([0, *new])}
    where |= {"key_value_seq_lengths": lengths, "local_window_size": window}
    arguments = {"query": query, "key_cache": caches[0], "value_cache": caches[1], **where}
    found = [np.asarray(x) for x in run({**arguments, "implementation": "fa3"})]
    key, value = (np.asarray(x, np.float64) for x in caches)
    first = 0
    for b, (count, length) in enumerate(zip(new, lengths, strict=True)):
        among = np.arange(count)
        among = among[(among < 32) | (among >= count - 32) | (among % 7 == 0)]
        own, rows = slice(first, first + count), first + among
        first += count
        pages = table[b, : owned[b]]
        its_key, its_value = (x[pages].reshape(-1, kv_heads, dim)[:length] for x in (key, value))
        its_query = np.asarray(query[own], np.float64)
        wanted = exact(its_query, its_key, its_value, among, window)
        out = np.asarray(found[0][rows], np.float64)
        np.testing.assert_allclose(out, wanted[0], rtol=2**-8, atol=2**-8)
        np.testing.assert_allclose(found[1][rows], wanted[1], rtol=4e-6, atol=1e-5)


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
        assert_near(wanted, call(np.minimum(np.array(other), lengths)))


def test_again_and_again():
    """Parts that a call before it, or another one, has left are never taken for its own."""
    calls = [Inputs(x, jnp.bfloat16) for x in EQUAL if x.name.endswith(("T 4", "sinks", "parts"))]

    def step(sign: Any, _: None) -> Any:
        return -sign, [kernel(x, query=sign * x.arguments()["query"]) for x in calls]

    found = jax.jit(lambda: jax.lax.scan(step, jnp.bfloat16(1), length=200)[1])()
    for x, (out, lse) in zip(calls, found, strict=True):
        assert_near(x, (out[0], lse[0]))
        assert equal(out[2:], out[:-2]) and equal(lse[2:], lse[:-2])
