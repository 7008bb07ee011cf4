"""The ring's steps on one device: by plain JAX, and on a Hopper GPU by the kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TABLE, Case
from helpers import Results, assert_rounded, both_oracles, equal, poison
from long_cases import LONG
from masks import documents, packed
from sequences import in_steps

CASES = {case.name: case for case in [*TABLE, *LONG]}
SMALL = [
    *("causal", "window and causal", "planted, window", "documents, broken run", "soft cap"),
    *("rows see nothing at all", "head dims 40, 40", "head dims 192, 128", "batch 0", "T = 0"),
]
ON_GPU = [
    *("causal", "planted, full", "planted, window", "planted, all keys", "groups of 3"),
    *("documents, broken run", "intervals of two", "rows see nothing at first", "batch 0", "T = 0"),
    *("head dims 40, 40", "head dims 160, 160", "head dims 192, 192", "head dims 192, 128"),
    *("soft cap", "soft cap, documents", "soft cap, lengths", "lengths 0", "everything"),
    *("long, causal", "long, documents", "long, full", "long, any intervals", "long, chunked"),
    *("long, lengths", "long, prefix-LM", "long, 192 and 128"),
]


def parts_of(case: Case) -> int:
    return next(n for n in (4, 3, 2) if case.S % n == 0)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="deterministic")
def found(case: Case, implementation: Any, inputs: Any, cotangents: Any, **options: Any) -> Results:
    return in_steps(case, parts_of(case), implementation, inputs, cotangents, **options)


oracles = jax.jit(both_oracles, static_argnums=(0, 1))


def check(case: Case, implementation: Any, dtype: Any) -> None:
    arguments = case.inputs(dtype), case.cotangents(dtype)
    poison(case, dtype)
    results = found(case, implementation, *arguments)
    assert results.out.dtype == results.dq.dtype == dtype
    exact, rounded = oracles(case, dtype, *arguments)
    assert_rounded(results, exact, rounded, case, jnp.finfo(dtype).eps)


@pytest.mark.parametrize("name", SMALL)
def test_steps_join_to_the_whole(name: str):
    check(CASES[name], "xla", jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_kernels(name: str):
    check(CASES[name], "fa3", [jnp.bfloat16, jnp.float16][ON_GPU.index(name) % 2])


def check_without_cotangents(implementation: Any) -> None:
    """A broken run's dq is 0 where nothing comes in, NaN elsewhere, after all steps of the ring."""
    ids = documents(70, 98, 32, ids=(0, 1, 0))
    case = Case("two runs of 0", 200, 200, 4, 2, 64, B=1, mask=packed(ids))
    inputs, (dout, dlse) = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    text = jnp.asarray(ids == 1)[None, :, None]
    dout, dlse = jnp.where(text[..., None], dout, 0), jnp.where(text, dlse, 0)
    dout, dlse = dout.at[0, 3, 1, 5].set(1e-30), dlse.at[0, 180, 3].set(-2)
    dq, dk, dv = (
        np.asarray(x, np.float32) for x in found(case, implementation, inputs, (dout, dlse))[2:]
    )
    nan = np.zeros((200, 4), bool)
    nan[[3, 180], [1, 3]] = True
    np.testing.assert_array_equal(np.isnan(dq)[0].all(-1), nan)
    assert not dq[0][(ids == 0)[:, None] & ~nan].any() and dq[0, ids == 1].any((1, 2)).all()
    assert np.isfinite(dq[0, ids == 1]).all() and np.isfinite(dk).all() and np.isfinite(dv).all()


def test_broken_rows_without_cotangents():
    check_without_cotangents("xla")


@pytest.mark.gpu
def test_broken_rows_without_cotangents_by_kernels():
    check_without_cotangents("fa3")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["long, causal", "long, any intervals", "head dims 40, 40"])
def test_deterministic(name: str):
    case = CASES[name]
    arguments = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    first = found(case, "fa3", *arguments, deterministic=True)
    assert all(equal(first, found(case, "fa3", *arguments, deterministic=True)) for _ in range(20))
