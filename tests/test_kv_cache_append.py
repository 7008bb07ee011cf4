"""jax_fa3.kv_cache.append against writing row by row."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kv_cases import E4M3, Case, Inputs
from modes import strict

from jax_fa3 import kv_cache
from jax_fa3.kv_cache import _rotary

append: Any = kv_cache.append  # whose arguments are given in tuples here
MIXED: Any = {"counts": (1, 17, 0, 1, 2), "lengths": (9, 17, 30, 0, 50), "ragged": True}
WINDOW: Any = {"options": {"local_window_size": 3}}
TABLE = [
    Case("T 1, page 8", (1,) * 5, (0, 1, 8, 9, 32), 8),
    Case("T 3, page 64, rows before the sequence", (3,) * 3, (2, 64, 66), 64),
    Case("ragged", **MIXED, spare=4),
    Case("ragged HND", **MIXED, layout="HND", V=8),
    Case("interleaved", (3,) * 3, (3, 17, 40), layout="interleaved"),
    Case("lanes, V 8", (3,) * 3, (3, 17, 40), layout="lanes", V=8),
    Case("contiguous", (3,) * 3, (3, 17, 40), pages=3, contiguous=True),
]
SCALED = [
    Case("no scale", (3,) * 2, (3, 40), cache_dtype=E4M3),
    Case("heads", **MIXED, cache_dtype=E4M3, scales="heads", spare=2),
    Case("sequences", (3,) * 2, (3, 40), cache_dtype=E4M3, scales="sequences", layout="HND"),
    Case("tokens", **MIXED, cache_dtype=E4M3, scales="tokens", layout="lanes"),
    Case("16 bits", (3,) * 2, (3, 40), scales="scalar", layout="interleaved"),
]


def new_rows(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """key and value, [rows, K, D], some of them large."""
    case = inputs.case
    dims = case.H, case.head_dim_v
    key, value = (inputs.rng.normal(size=(case.rows, case.K, d)) * 3 for d in dims)
    key[0, 0, 0], value[-1, -1, -1] = 1e4, -np.inf
    return tuple(np.asarray(x, inputs.dtype).astype(np.float64) for x in (key, value))  # pyright: ignore


def written(inputs: Inputs, key: np.ndarray, value: np.ndarray) -> Any:
    """Writes it into inputs.key and inputs.value, row by row; gives the caches."""
    case, row = inputs.case, 0
    limit = 448 if inputs.cache_dtype == E4M3 else np.inf
    for b, (count, length) in enumerate(zip(case.counts, case.lengths, strict=True)):
        for i in range(count):
            position = length - count + i
            if position >= 0:
                at = inputs.pages[b, position // inputs.page], position % inputs.page
                for old, new, scale in zip(
                    (inputs.key, inputs.value), (key, value), inputs.scale, strict=True
                ):
                    x = new[row].astype(np.float32) / scale[at].astype(np.float32)[:, None]
                    old[at] = np.clip(x, -limit, limit)
            row += 1
    return inputs.caches()


def call_of(inputs: Inputs, key: np.ndarray, value: np.ndarray, **more: Any) -> Any:
    arguments = inputs.arguments()
    new = (jnp.asarray(inputs.shaped(x), inputs.dtype) for x in (key, value))
    for name in ("query", *inputs.case.options):
        del arguments[name]
    caches = [arguments.pop(name) for name in ("key_cache", "value_cache")]
    with strict():
        return append(*caches, *new, **arguments, **more)


@pytest.mark.parametrize("case", [*TABLE, *SCALED], ids=str)
def test_writes(case: Case):
    """Bit by bit, and nothing else."""
    inputs = Inputs(case, jnp.bfloat16 if case in SCALED else jnp.float32)
    key, value = new_rows(inputs)
    found = call_of(inputs, key, value)
    for x, y in zip(found, written(inputs, key, value), strict=True):
        if x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize(
    "argument, place, value",
    [("key_value_seq_lengths", 1, 81), ("page_table", (1, 2), -1), ("page_table", (1, 2), 99)],
)
def test_mistakes_write_nothing(argument: str, place: Any, value: Any):
    """In that sequence; pages that get no new row may be anything."""
    case = Case("", (2,) * 3, (20, 40, 9), pages=5)
    inputs = Inputs(case, jnp.float32)
    new = new_rows(inputs)
    inputs.table[1, 0] = -7
    before = np.array(inputs.key)
    arguments = inputs.where()
    arguments[argument] = np.array(arguments[argument])
    arguments[argument][place] = value
    rows = (jnp.asarray(inputs.shaped(x), jnp.float32) for x in new)
    found = append(*inputs.caches(), *rows, **arguments)
    written(inputs, *new)
    inputs.key[inputs.pages[1]] = before[inputs.pages[1]]
    np.testing.assert_array_equal(found[0], inputs.key.astype(np.float32))


def test_scale_of_0():
    """Heads of zeros, whose largest number is their scale, are zeros."""
    cache = jnp.zeros((1, 8, 1, 4), E4M3)
    new = jnp.zeros((1, 1, 1, 4), jnp.bfloat16)
    scales: Any = {"key_scale": 0.0, "value_scale": 0.0}
    key, value = append(cache, cache, new, new, [1], **scales)
    out = kv_cache.dot_product_attention(new, key, value, [1], **scales)
    np.testing.assert_array_equal(np.asarray(out, np.float32), 0)


def test_scales_are_a_cache_too():
    """Of head dim 1: append writes those of new tokens."""
    case = Case("", (2,) * 2, (20, 3), cache_dtype=E4M3, scales="tokens")
    inputs = Inputs(case, jnp.bfloat16)
    pools = [jnp.asarray(x[..., None], jnp.float32) for x in inputs.scale]
    new = [jnp.asarray(inputs.rng.uniform(1, 2, (2, 2, 2, 1)), jnp.float32) for _ in range(2)]
    pools = append(*pools, *new, **inputs.where())
    at = inputs.pages[0, 1], 20 % 16 - 1
    np.testing.assert_array_equal(pools[0][at], new[0][0, 1])
    rows = [jnp.full((2, 2, 2, 16), 3.0, jnp.bfloat16)] * 2
    scales = {"key_scale": pools[0], "value_scale": pools[1]}
    caches = append(*inputs.caches(), *rows, **inputs.where(), **scales)
    stands_for = np.asarray(caches[1][at], np.float32) * pools[1][at]
    np.testing.assert_allclose(stands_for, 3, rtol=2**-4)


def turned(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """x [heads, D] by the angles [pairs], pair by pair."""
    x, count = np.array(x), len(angles)
    for i, angle in enumerate(angles):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + count)
        pair = x[:, a] + 1j * x[:, b]
        pair = pair * np.exp(1j * angle)
        x[:, a], x[:, b] = pair.real, pair.imag
    return x


@pytest.mark.parametrize("dims", [16, 6])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool, dims: int):
    """Of all dims and of some, at the rows' own positions."""
    inputs = Inputs(Case("", **MIXED, spare=2), jnp.float32)
    key, value = (np.nan_to_num(x, neginf=0) for x in new_rows(inputs))
    key[0, 0, 0] = 1
    angles = np.arange(60)[:, None] * 10.0 ** -np.arange(dims // 2)
    tables = {"rotary_cos": np.cos(angles), "rotary_sin": np.sin(angles)}
    query = jnp.asarray(inputs.shaped(inputs.query), jnp.float32)
    options: Any = {**tables, "rotary_interleaved": interleaved, "query": query}
    found = call_of(inputs, key, value, **options)
    row, wanted = 0, np.array(inputs.query)
    for count, length in zip(inputs.case.counts, inputs.case.lengths, strict=True):
        for i in range(count):
            position = max(length - count + i, 0)
            for x in (key, wanted):
                x[row] = turned(x[row], angles[position], interleaved)
            row += 1
    np.testing.assert_allclose(found[2][:row], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[0], written(inputs, key, value)[0], rtol=1e-5, atol=1e-5)


def test_rotary_at_positions():
    """Of the caller's: negative ones are padding, those beyond the tables a mistake."""
    case = Case("", (2,) * 3, (2, 20, 5))
    inputs = Inputs(case, jnp.float32)
    key, value = (np.nan_to_num(x, neginf=0) for x in new_rows(inputs))
    angles = np.arange(30)[:, None] * np.ones(8)
    tables = {"rotary_cos": np.cos(angles), "rotary_sin": np.sin(angles)}
    query = jnp.asarray(inputs.shaped(inputs.query), jnp.float32)
    positions = np.array([[-1, 0], [3, 29], [30, 2]])
    found = call_of(inputs, key, value, query=query, positions=positions, **tables)
    np.testing.assert_array_equal(np.isnan(found[2]).all((1, 2, 3)), [False, False, True])
    assert not np.isnan(found[2][:2]).any()
    wanted = turned(inputs.query[3], angles[29], False)
    np.testing.assert_allclose(found[2][1, 1], wanted, rtol=1e-5, atol=1e-5)
    old = np.asarray(inputs.caches()[0][inputs.pages[2, 0]])
    np.testing.assert_array_equal(found[0][inputs.pages[2, 0]], old)


def test_rotates_in_fp32_and_rounds_once():
    x = jax.random.normal(jax.random.key(0), (4, 2, 8), jnp.bfloat16)
    cos = jnp.cos(jnp.arange(16, dtype=jnp.float32)).reshape(4, 4)
    tables = _rotary.Tables(cos, jnp.sqrt(1 - cos**2))
    found = _rotary.rotate(x, tables, jnp.arange(4), False)
    wide = _rotary.rotate(x.astype(jnp.float32), tables, jnp.arange(4), False)
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


def test_has_no_derivative():
    cache = jnp.zeros((1, 8, 2, 8))
    with pytest.raises(NotImplementedError, match="jax_fa3.kv_cache has no derivatives"):
        new = jnp.ones((1, 1, 2, 8))
        jax.grad(lambda x: append(cache, cache, x, x, [1])[0].sum())(new)


def test_saturates_as_ml_dtypes_rounds():
    """Every bfloat16 number: the nearest e4m3 number, at most 448, and NaN only for NaN."""
    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    cache = jnp.zeros((1, 2**16, 1, 1), E4M3)
    new = jnp.asarray(x.reshape(1, -1, 1, 1))
    found = np.asarray(append(cache, cache, new, new, [2**16])[0]).ravel()
    with np.errstate(invalid="ignore"):  # of NaN
        wanted = np.clip(x.astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(found.astype(np.float32), wanted.astype(np.float32))
