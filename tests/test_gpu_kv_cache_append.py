"""The appending kernel: against writing row by row, and against XLA bit by bit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equal
from kv_cases import E4M3, Case, Inputs
from modes import strict
from test_kv_cache_append import SCALED, TABLE, new_rows, written
from test_kv_cache_modes import MISTAKES

from jax_fa3 import kv_cache

pytestmark = pytest.mark.gpu
append: Any = functools.partial(kv_cache.append, implementation="fa3")

MIXED: Any = {"counts": (1, 17, 0, 1, 2, 40, 1), "lengths": (9, 17, 30, 0, 50, 64, 700)}
RAGGED: Any = {**MIXED, "ragged": True}
LAYOUTS = "NHD", "HND", "interleaved", "lanes"
WRITTEN = [
    *(x for x in (*TABLE, *SCALED) if x.name != "16 bits"),
    *(Case(f"vectors, {x}", **RAGGED, H=128, V=None if x == "interleaved" else 64, layout=x, spare=9) for x in LAYOUTS),
    *(Case(f"e4m3, {x}", **RAGGED, H=128, layout=x, cache_dtype=E4M3, scales="tokens") for x in LAYOUTS),
    *(Case(f"head dim {h}, {dtype and 'e4m3'}", **RAGGED, H=h, cache_dtype=dtype) for h in (12, 20, 36, 80) for dtype in (None, E4M3)),
    *(Case(f"page {p}", (5,) * 3, (5, 130, 515), p, H=64) for p in (1, 5, 8, 24, 256)),
    Case("prompts", (1000, 3000), (1000, 5000), 16, K=1, H=64, ragged=True),
    Case("many", (1,) * 600, (70,) * 600, 8, K=1, H=16, ragged=True),
    Case("contiguous, odd", (3,) * 3, (1001, 3, 500), 1001, H=128, pages=1, contiguous=True),
]  # fmt: skip


def call_of(inputs: Inputs, key: Any, value: Any, **more: Any) -> dict[str, Any]:
    arguments = inputs.arguments()
    for name in ("query", *inputs.case.options):
        del arguments[name]
    new = (jnp.asarray(inputs.shaped(x), inputs.dtype) for x in (key, value))
    return {**arguments, **dict(zip(("key", "value"), new, strict=True)), **more}


def run_together(calls: list[dict[str, Any]], implementation: str) -> Any:
    """kv_cache.append of each, in one program, as compiling takes longest."""
    arrays = [{k: x for k, x in c.items() if isinstance(x, np.ndarray | jax.Array)} for c in calls]
    static = [{k: c[k] for k in c.keys() - a.keys()} for c, a in zip(calls, arrays, strict=True)]

    @jax.jit
    def program(arrays: Any) -> Any:
        both = zip(arrays, static, strict=True)
        function: Any = kv_cache.append
        return [function(**x, **y, implementation=implementation) for x, y in both]

    with strict():
        return program(arrays)


@functools.cache
def of_table(dtype: Any) -> dict[str, Any]:
    inputs = [Inputs(case, dtype) for case in WRITTEN]
    rows = [new_rows(x) for x in inputs]
    found = run_together([call_of(x, *y) for x, y in zip(inputs, rows, strict=True)], "fa3")
    return {x.case.name: (x, y, z) for x, y, z in zip(inputs, rows, found, strict=True)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", WRITTEN, ids=str)
def test_writes(case: Case, dtype: Any):
    """Bit by bit, and nothing else: all other places have their NaN still."""
    inputs, rows, found = of_table(dtype)[case.name]
    for x, y in zip(found, written(inputs, *rows), strict=True):
        if x is not None:
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def rotary(inputs: Inputs, pairs: int, interleaved: bool, dtype: Any, at: bool) -> dict[str, Any]:
    angles = np.arange(800)[:, None] * 10.0 ** -(np.arange(pairs) * 4 / pairs)
    query = jnp.asarray(inputs.shaped(inputs.query), inputs.dtype)
    found = {"rotary_interleaved": interleaved, "query": query}
    found |= {"rotary_cos": jnp.asarray(np.cos(angles), dtype)}
    found |= {"rotary_sin": jnp.asarray(np.sin(angles), dtype)}
    if at:
        found["positions"] = inputs.rng.integers(-3, 800, query.shape[:-2])
    return found


ROTATED = [
    (Case("128", **RAGGED, H=128, spare=3), 64, jnp.float32, False),
    (Case("of positions", **RAGGED, H=128), 64, jnp.float32, True),
    (Case("some dims", **RAGGED, H=64, layout="HND"), 16, jnp.float32, False),
    (Case("few dims", **RAGGED, H=64, layout="lanes", V=16), 3, jnp.float32, True),
    (Case("tables of 16 bits", **RAGGED, H=128, N=8), 64, jnp.bfloat16, False),
    (Case("e4m3", **RAGGED, H=128, cache_dtype=E4M3, scales="heads"), 64, jnp.float32, False),
    (Case("rows before", (3,) * 3, (2, 64, 66), 64, H=80, layout="interleaved"), 40, jnp.float32, False),
    (Case("odd head dim", (3,) * 3, (2, 64, 66), 64, H=20), 10, jnp.float32, False),
]  # fmt: skip


@functools.cache
def rotated() -> dict[Any, Any]:
    """As the kernel has it and as XLA does on this GPU."""
    names, calls = [], []
    for case, pairs, dtype, at in ROTATED:
        for interleaved in (False, True):
            inputs = Inputs(case, jnp.bfloat16)
            key, value = (np.nan_to_num(x, neginf=0) for x in new_rows(inputs))
            names.append((case.name, interleaved))
            calls.append(
                call_of(inputs, key, value, **rotary(inputs, pairs, interleaved, dtype, at))
            )
    both = zip(run_together(calls, "fa3"), run_together(calls, "xla"), strict=True)
    return dict(zip(names, both, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("case", [x for x, *_ in ROTATED], ids=str)
def test_rotates_as_xla(case: Case, interleaved: bool):
    """Bit by bit, but for e4m3's scales: XLA's divisions on GPUs are approximations."""
    found, wanted = rotated()[case.name, interleaved]
    for x, y in zip(found, wanted, strict=True):
        if y is not None:
            x, y = (np.asarray(z, np.float32) for z in (x, y))
            if case.cache_dtype != E4M3:
                np.testing.assert_array_equal(x, y)
            same = (x == y) | (np.isnan(x) & np.isnan(y))
            assert (~same).mean() <= 1e-4
            np.testing.assert_allclose(x[~same], y[~same], rtol=2.0**-3)  # the next number


@pytest.mark.parametrize("name, ragged", [*((name, True) for name in MISTAKES), ("length", False)])
@pytest.mark.parametrize("count", [2, 40])
def test_mistakes_write_nothing(name: str, ragged: bool, count: int):
    argument, place, value = MISTAKES[name]
    case = Case("", (count,) * 3, (count, 80, 50), pages=5, H=64, ragged=ragged, spare=3 * ragged)
    inputs = Inputs(case, jnp.bfloat16)
    rows = new_rows(inputs)
    call = call_of(inputs, *rows, **rotary(inputs, 32, False, jnp.float32, False))
    changed = np.array(call[argument])
    changed[place] = value
    found, wanted = (
        run_together([{**call, argument: changed}], implementation)[0]
        for implementation in ("fa3", "xla")
    )
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_positions_beyond_the_tables_are_mistakes():
    inputs = Inputs(Case("", (40,) * 3, (40, 80, 50), pages=5, H=64), jnp.bfloat16)
    call = call_of(inputs, *new_rows(inputs), **rotary(inputs, 32, True, jnp.float32, True))
    call["positions"][1, 39] = 800
    found, wanted = (run_together([call], x)[0] for x in ("fa3", "xla"))
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_scales_are_a_cache_too():
    case = Case("", **RAGGED, cache_dtype=E4M3, scales="tokens")
    inputs = Inputs(case, jnp.bfloat16)
    pools = [jnp.asarray(x[..., None], jnp.float32) for x in inputs.scale]
    shape = case.rows, case.K, 1
    new = [jnp.asarray(inputs.rng.uniform(1, 2, shape), jnp.float32) for _ in range(2)]
    found = append(*pools, *new, **inputs.where())
    wanted = kv_cache.append(*pools, *new, **inputs.where(), implementation="xla")
    assert equal(found, wanted)


def test_a_pool_of_more_than_2_to_the_31_numbers():
    """The last page but one, and nothing else."""
    pages, page, heads, dim = 2**31 // (64 * 16 * 128) + 100, 64, 8, 128
    pool = jnp.zeros((pages, page, 2 * heads, dim), E4M3)
    assert pool.size > 2**31
    new = jnp.ones((1, 3, heads, dim), E4M3)
    table = np.array([[7, pages - 2]])
    call = jax.jit(
        lambda x: append(x, None, new, new, [66], page_table=table, kv_layout="interleaved"),
        donate_argnums=0,
    )
    pool, _ = call(pool)
    count = jax.jit(lambda x: jnp.sum(x.astype(jnp.bfloat16), (1, 2, 3), jnp.float32))(pool)
    at = {i: float(count[i]) for i in np.flatnonzero(np.asarray(count))}
    assert at == {7: 2 * heads * dim, pages - 2: 2 * 2 * heads * dim}
