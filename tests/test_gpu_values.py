"""The kernels on values that are not unit normals: means, scales, one sign, outliers, huge scores,
small and large cotangents, NaN where nobody looks, very long sums."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, Case
from helpers import ROWS, Results, assert_rounded, beside_fp64, both_oracles, with_gradients
from jax import Array
from masks import documents, ints, packed

import jax_fa3

pytestmark = pytest.mark.gpu

attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)
oracles = jax.jit(both_oracles, static_argnums=(0, 1))
DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])


def outliers(x: Array) -> Array:
    return jnp.where(jax.random.bernoulli(jax.random.key(9), 1e-3, x.shape), 50 * x, x)


VALUES = {
    "mean": lambda x: 1 + 0.3 * x,
    "1e-3": lambda x: 1e-3 * x,
    "30": lambda x: 30 * x,
    "100": lambda x: 100 * x,
    "one sign": jnp.abs,
    "outliers": outliers,
}


def results(case: Case, cotangents: Any, *inputs: Array) -> Results:
    call = functools.partial(attention, **case.arguments)
    return jax.jit(functools.partial(with_gradients, call))(cotangents, *inputs)


def check_values(case: Case, values: str, dtype: Any) -> None:
    """Of query and key; scores are up to 1e5 where these are of scale 100."""
    query, key, value = (x.astype(jnp.float32) for x in case.inputs(dtype))
    change = VALUES[values]
    inputs = tuple(x.astype(dtype) for x in (change(query), change(key), value))
    cotangents = case.cotangents(dtype)
    exact, rounded = oracles(case, dtype, inputs, cotangents)
    found = results(case, cotangents, *inputs)
    # Of these rows a few see more than one key that counts, and so have any error.
    few_with_errors = values in ("30", "100") or (values == "outliers" and case.S < 100)
    rows = case.T if few_with_errors else ROWS
    if values in ("30", "100"):  # fp32 has not digits enough for such scores
        exact, rounded = beside_fp64(case, exact, rounded, cotangents, inputs)
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps, rows)


@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize("values", VALUES)
def test_values(values: str, head_dim: int, dtype: Any):
    check_values(Case(f"values {values}", 300, 333, 4, 2, head_dim, mask=CAUSAL), values, dtype)


@DTYPES
@pytest.mark.parametrize("values", VALUES)
def test_values_of_few_keys(values: str, dtype: Any):
    """Which stay in shared memory for several tiles."""
    check_values(Case(f"few {values}", 1700, 77, 8, 4, 64, B=4), values, dtype)


@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize("growth", [1, 3, 6, 12])
def test_maxima_that_rise(growth: int, head_dim: int, dtype: Any):
    """The kernels go from the last key to the first: of these, weights relative to the maximum so far are
    beyond 16 bits in no, some or most rows."""
    case = Case(f"rising {growth}", 700, 900, 4, 2, head_dim, mask=CAUSAL)
    query, key, value = case.inputs(dtype)
    inputs = query, key.at[:, :300, 1:].multiply(growth), value
    cotangents = case.cotangents(dtype)
    exact, rounded = oracles(case, dtype, inputs, cotangents)
    found = results(case, cotangents, *inputs)
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)


@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize("values", ["mean", "1e-3", "30", "one sign", "outliers"])
def test_values_of_value_and_cotangent(values: str, head_dim: int, dtype: Any):
    case = Case(f"value {values}", 300, 333, 4, 2, head_dim)
    query, key, value = case.inputs(dtype)

    def change(x: Array) -> Array:
        return VALUES[values](x.astype(jnp.float32)).astype(dtype)

    inputs, (dout, dlse) = (query, key, change(value)), case.cotangents(dtype)
    cotangents = change(dout), dlse * 1e-3
    exact, rounded = oracles(case, dtype, inputs, cotangents)
    found = results(case, cotangents, *inputs)
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)


@HEAD_DIMS
@pytest.mark.parametrize("exponent", [-20, -13, -7, 7, 10])
def test_cotangents_of_any_scale(exponent: int, head_dim: int):
    """fp16: as exact as for a scale of 1, but for the rounding of the gradients themselves."""
    dtype, size = jnp.float16, 2.0**exponent
    case = Case("scales", 300, 333, 4, 2, head_dim, mask=CAUSAL)
    inputs, (dout, dlse) = case.inputs(dtype), case.cotangents(dtype)
    dout = (dout.astype(jnp.float32) * size).astype(dtype).astype(jnp.float32) / size
    exact, rounded = oracles(case, dtype, inputs, (dout, dlse))
    found = results(case, ((dout * size).astype(dtype), dlse * size), *inputs)

    def scaled(x: Results) -> Results:
        wide = (jnp.asarray(a, jnp.float32) * size for a in x[2:])
        return x._replace(**dict(zip(Results._fields[2:], wide, strict=True)))

    exact, rounded = scaled(exact), scaled(rounded)
    narrow = (jax.lax.reduce_precision(x, 5, 10) for x in rounded[2:])
    rounded = Results(*rounded[:2], *narrow)
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)


@HEAD_DIMS
def test_large_values_and_cotangents_in_fp16(head_dim: int):
    """dS itself would be beyond fp16's range."""
    case = Case("400", 200, 200, 2, 2, head_dim)
    query, key, value = case.inputs(jnp.float16)
    dout, dlse = case.cotangents(jnp.float16)
    query, key = query / 64, key / 64  # so that the gradients are within it
    found = results(case, (400 * dout, dlse), query, key, 400 * value)
    exact, rounded = oracles(
        case, jnp.float16, (query, key, value), (dout * jnp.float16(1), dlse / 400**2)
    )
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)
    for name in ("dq", "dk"):
        x, y, z = (np.asarray(getattr(r, name), np.float32) for r in (found, exact, rounded))
        y, z = y * 400**2, z * 400**2
        assert np.abs(x - y).max() <= 2 * np.abs(z - y).max() + 2.0**-10 * np.abs(y).max()


HUGE = [(jnp.float16, x) for x in (6e3, 2e4)] + [(jnp.bfloat16, x) for x in (3e4, 1e6, 1e12)]


@pytest.mark.parametrize(("dtype", "size"), HUGE, ids=str)
@HEAD_DIMS
def test_huge_scores(head_dim: int, dtype: Any, size: float):
    """Scores of 1e7 to 1e24: each row takes the value of its best key, if fp32 can tell which that
    is, and dv is the sum of those rows' dout. All is finite."""
    case = Case("huge", 300, 400, 2, 2, head_dim, B=1, mask=CAUSAL)
    query, key, value = case.inputs(jnp.float32)
    largest = 6e4 if dtype == jnp.float16 else 1e30
    query, key = (jnp.clip(x * size, -largest, largest) for x in (query, key))
    inputs = tuple(x.astype(dtype) for x in (query, key, value))
    dout, dlse = case.cotangents(dtype)
    found = results(case, (dout, jnp.zeros_like(dlse)), *inputs)
    finite = found[:2] + found[4:] if size > 1e4 and dtype == jnp.float16 else found
    for x in finite:  # dq and dk of fp16 may be beyond its range
        assert np.isfinite(np.asarray(x, np.float32)).all()

    wide = [np.asarray(x, np.float64)[0].swapaxes(0, 1) for x in inputs]  # [N, T or S, H]
    scale = 1 / math.sqrt(head_dim)
    products = wide[0] @ wide[1].swapaxes(1, 2) * scale
    scores = np.where(np.tri(300, 400, dtype=bool), products, -np.inf)
    norms = [np.linalg.norm(x, axis=-1) for x in wide[:2]]
    doubt = 1e-5 * scale * norms[0] * norms[1].max(-1, keepdims=True)  # [N, T]
    second, first = np.moveaxis(np.sort(scores, -1)[..., -2:], -1, 0)
    clear = first - second > doubt
    assert clear.mean() > 0.95
    best = scores.argmax(-1)
    out, lse = np.asarray(found.out, np.float64)[0], np.asarray(found.lse, np.float64)[0]
    values = np.take_along_axis(wide[2], best[..., None], 1)
    np.testing.assert_array_equal(out.swapaxes(0, 1)[clear], values[clear])
    assert (np.abs(lse.T - first) <= doubt)[clear].all()

    expected = np.zeros(wide[2].shape)
    doubtful = np.zeros(wide[2].shape[:2], bool)
    for n, t in np.ndindex(best.shape):
        if clear[n, t]:
            expected[n, best[n, t]] += np.asarray(dout, np.float64)[0, t, n]
        else:
            doubtful[n] |= scores[n, t] > first[n, t] - 2 * doubt[n, t]
    dv = np.asarray(found.dv, np.float64)[0].swapaxes(0, 1)
    error = np.abs(dv - expected)[~doubtful].max()
    assert error <= float(jnp.finfo(dtype).eps) * np.abs(expected).max()


@pytest.mark.parametrize(
    ("dtype", "number"), [(jnp.float16, 6e4), (jnp.bfloat16, 133120.0)], ids=str
)
@HEAD_DIMS
def test_equal_huge_scores(head_dim: int, dtype: Any, number: float):
    shape = (1, 200, 2, head_dim)
    query, key = (jnp.full(shape, number, dtype) for _ in range(2))
    value = jax.random.normal(jax.random.key(0), shape, dtype)
    case = Case("equal", 200, 200, 2, 2, head_dim, B=1)
    dout, dlse = case.cotangents(dtype)
    found = results(case, (dout, dlse), query, key, value)
    mean = np.asarray(value, np.float64).mean(1, keepdims=True)
    error = np.abs(np.asarray(found.out, np.float64) - mean).max()
    assert error < 4 * float(jnp.finfo(dtype).eps) * np.abs(mean).max()
    dv = np.asarray(dout, np.float64).mean(1, keepdims=True)
    error = np.abs(np.asarray(found.dv, np.float64) - dv).max()
    assert error < 0.02 * np.abs(dv).max()


@HEAD_DIMS
@pytest.mark.parametrize("deterministic", [False, True])
def test_nan_cotangents_of_rows_that_see_nothing(head_dim: int, deterministic: bool):
    """And of rows of a broken run: no other row's gradient knows of them."""
    ids = np.array(documents(60, 90, 50, ids=(3, 0, 5)))
    ids[10:40], ids[100:107] = -1, -1
    lengths = {"query_seq_lengths": ints(187)}
    masks = [
        {**packed(ids), **CAUSAL},
        packed(documents(70, 100, 30, ids=(0, 1, 0))),
        {"is_causal": True, "query_offset": -77, **lengths},
        {"local_window_size": (5, 5), "query_offset": 150},
    ]
    for mask in masks:
        case = Case("blind rows", 200, 200, 4, 2, head_dim, B=1, mask=mask)
        (dout, dlse), inputs = case.cotangents(jnp.bfloat16), case.inputs(jnp.bfloat16)
        call = functools.partial(attention, **case.arguments, deterministic_backward=deterministic)
        gradients = jax.jit(functools.partial(with_gradients, call))
        clean = gradients((dout, dlse), *inputs)
        lse = np.asarray(clean.lse)
        blind = jnp.asarray(~np.isfinite(lse))  # [1, T, N]
        assert blind.any() and not blind.all()
        for poison in (jnp.nan, jnp.inf):
            bad = jnp.where(blind[..., None], poison, dout), jnp.where(blind, poison, dlse)
            found = gradients(bad, *inputs)
            zero = gradients(
                (jnp.where(blind[..., None], 0, dout), jnp.where(blind, 0, dlse)), *inputs
            )
            for name in ("dk", "dv"):
                x, y = (np.asarray(getattr(r, name), np.float32) for r in (found, zero))
                np.testing.assert_array_equal(x, y)
            seen = ~np.asarray(blind)
            x, y = (np.asarray(r.dq, np.float32)[seen] for r in (found, zero))
            np.testing.assert_allclose(x, y, rtol=2**-7, atol=2**-9 * np.abs(y).max())
            dq = np.asarray(found.dq, np.float32)[~seen]
            broken = np.isnan(lse)[~seen]
            assert np.isnan(dq[broken]).all() and not dq[~broken].any()
