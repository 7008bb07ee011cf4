"""The oracle of a case, and the rule by which results are compared with it (CONTRIBUTING.md, tests)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from jax import Array, lax
from jax.typing import DTypeLike

from jax_fa3 import _reference

ROWS = 64  # errors are compared per batch entry, head and this many rows


class Results(NamedTuple):
    """Of one case; without gradients these are None."""

    out: Array  # [B, T, N, V]
    lse: Array  # [B, T, N]
    dq: Any = None  # [B, T, N, H]
    dk: Any = None  # [B, S, K, H]
    dv: Any = None  # [B, S, K, V]


def with_gradients(function: Any, cotangents: tuple[Array, Array], *inputs: Array) -> Results:
    """function(*inputs) -> (out, lse), and its gradients."""
    results, pullback = jax.vjp(function, *inputs)
    return Results(*results, *pullback(cotangents))


def oracle(
    case: Case, dtype: DTypeLike, inputs: Any, cotangents: Any = None, *, rounded: bool = False
) -> Results:
    """_reference in fp32 (fp64 for fp64 inputs), or with its steps rounded to dtype.

    So are the gradients, and out where their maths has it: in the row's sum of dout * out, which
    enters as the cotangent of lse does, with the other sign (FlashAttention-2, algorithm 2).
    """
    return _oracle(case, jnp.dtype(dtype), rounded, list(inputs), cotangents)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # one program, not one for each step of it
def _oracle(case: Case, dtype: Any, rounded: bool, inputs: Any, cotangents: Any) -> Results:
    wide = jnp.promote_types(dtype, jnp.float32)
    inputs = [x.astype(wide) for x in inputs]

    def function(*inputs: Array) -> tuple[Array, Array]:
        round_to = dtype if rounded else None
        return _reference.attention(*inputs, **case.arguments, round_to=round_to)

    with jax.default_matmul_precision("highest"):
        if cotangents is None:
            return Results(*function(*inputs))
        dout, dlse = (x.astype(wide) for x in cotangents)
        if rounded:
            out, exact = function(*inputs)[0], _reference.attention(*inputs, **case.arguments)[0]
            change = jnp.nan_to_num(dout) * jnp.nan_to_num(out - exact)
            dlse -= change.sum(-1)
        results = with_gradients(function, (dout, dlse), *inputs)
        if not rounded:
            return results
        narrow = (lax.optimization_barrier(x.astype(dtype)).astype(wide) for x in results[2:])
        return Results(*results[:2], *narrow)


def reference(*arrays: Array, **options: Any) -> tuple[Array, Array]:
    """_reference.attention as one program. Options are no arguments of it, as masks have to be concrete."""
    return jax.jit(functools.partial(_reference.attention, **options))(*arrays)


def both_oracles(
    case: Case, dtype: DTypeLike, inputs: Any, cotangents: Any = None
) -> tuple[Results, Results]:
    """Exact, and rounded to dtype."""
    exact = oracle(case, dtype, inputs, cotangents)
    return exact, oracle(case, dtype, inputs, cotangents, rounded=True)


def temporary_bytes(function: Any, *args: Any) -> int:
    """Device memory that the compiled function needs beside arguments and results."""
    memory = jax.jit(function).lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def poison(case: Case, dtype: Any) -> None:
    """Leaves NaN in free memory of the results' sizes, which the allocator hands out next."""
    *_, out = case.shapes
    b, t, n, _ = out
    filled = [jax.device_put(np.full(out, np.nan, jnp.dtype(dtype))) for _ in range(3)]
    filled += [jax.device_put(np.full((b, n, t), np.nan, np.float32)) for _ in range(3)]
    jax.block_until_ready(filled)


def equal(x: Any, y: Any) -> bool:
    """Whether two pytrees of 8-bit, 16-bit and 32-bit numbers are the same bit by bit."""
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}
    x, y = ([np.asarray(a) for a in jax.tree.leaves(tree)] for tree in (x, y))
    x, y = ([a.view(bits[a.dtype.itemsize]) for a in leaves] for leaves in (x, y))
    return all(np.array_equal(a, b) for a, b in zip(x, y, strict=True))


def assert_close(found: Any, exact: Any, tolerance: float) -> None:
    """Two pytrees of arrays."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def assert_alike(found: Any, exact: Any) -> None:
    """Two pytrees of arrays of 16-bit results of the same maths in another order, in their dtypes too."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0.01, atol=0.02)


def assert_same(found: Results, exact: Results, *, rtol: float) -> None:
    """For fp32 and fp64, where rounding is not an issue: close, NaN and inf in the same places."""
    for name, x, y in zip(Results._fields, found, exact, strict=True):
        if x is not None and y is not None:
            x, y = np.asarray(x), np.asarray(y)
            scale = np.abs(y, where=np.isfinite(y), out=np.zeros_like(y)).max(initial=1)
            np.testing.assert_allclose(x, y, rtol=0, atol=rtol * scale, err_msg=name)


def assert_rounded(
    found: Results, exact: Results, rounded: Results, case: Case, eps: Any, rows: int = ROWS
) -> None:
    """The tolerance rule: an error at most twice that of the rounded oracle, group by group.

    eps: of the inputs' dtype. rows: of a group, more where few of them have an error at all. The small
    absolute term is a quarter of a unit in the last place of the head's largest number, for groups of a
    few numbers have small errors by luck; lse, which is fp32, gets less.
    """
    factor = 2 if case.logits_soft_cap is None else 3
    for name, *xs in zip(Results._fields, found, exact, rounded, strict=True):
        if any(x is None for x in xs):
            continue
        x, y, z = (_grouped(np.asarray(a, np.float32), rows) for a in xs)
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y), err_msg=f"{case}: NaN in {name}")
        infinite = np.isinf(y)
        np.testing.assert_array_equal(np.isinf(x), infinite, err_msg=f"{case}: inf in {name}")
        np.testing.assert_array_equal(x[infinite], y[infinite], err_msg=f"{case}: inf in {name}")
        x, y, z = (np.nan_to_num(a, posinf=0, neginf=0) for a in (x, y, z))
        size = np.abs(y).max((1, 2, 4), initial=0)[:, None]  # [B, 1, N]
        limit = factor * _largest(z - y) + (1e-4 if name == "lse" else eps) / 4 * size
        error = _largest(x - y)  # [B, T / ROWS, N]
        bad = np.argwhere(~(error <= limit))
        if len(bad):
            where = tuple(bad[0])
            batch, group, head = where
            raise AssertionError(
                f"{case}: {name} is off by {error[where]:.3g}, more than {limit[where]:.3g}, in "
                f"{len(bad)} groups, the first: batch {batch}, head {head}, "
                f"rows {group * rows} to {group * rows + rows - 1}"
            )


def _grouped(x: np.ndarray, rows: int) -> np.ndarray:
    """[B, T, N] or [B, T, N, D] as [B, T / rows, rows, N, D]."""
    x = x if x.ndim == 4 else x[..., None]
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % rows), (0, 0), (0, 0)))
    return x.reshape(x.shape[0], x.shape[1] // rows, rows, *x.shape[2:])


def _largest(x: np.ndarray) -> np.ndarray:
    return np.abs(x).max((2, 4), initial=0)  # [B, T / ROWS, N]


def beside_fp64(
    case: Case, exact: Results, rounded: Results, cotangents: Any, inputs: Any
) -> tuple[Results, Results]:
    """The oracle in fp64, and off from it by what rounding and fp32 sums of scores make together."""
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in inputs], [x.astype(jnp.float64) for x in cotangents]
        true = oracle(case, jnp.float64, *wide)
        triples = [
            [np.asarray(x, np.float64) for x in t] for t in zip(true, exact, rounded, strict=True)
        ]
    off: Any = [x + np.abs(z - y) + np.abs(y - x) for x, y, z in triples]
    found: Any = [x for x, _, _ in triples]
    return Results(*found), Results(*off)
