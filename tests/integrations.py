"""What the tests of the adapters share: the two bars by which they are compared with a project's own
attention, and how far from them the largest errors were, which a run in one process prints at its end
(tests/conftest.py) and docs/integrations.md tells."""

import dataclasses
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from lowering import lower, targets

from jax_fa3 import _ffi, _targets


@dataclasses.dataclass
class Measured:
    """Of one file of tests: the largest error of fp32, relative to the largest number of each array or
    to 1; the largest mean error of bf16, as a multiple of the project's own."""

    fp32: float = 0
    bf16: float = 0
    calls: int = 0  # that reached the kernels

    def __str__(self) -> str:
        errors = f"fp32 {self.fp32:.1e}, bf16 {self.bf16:.3f} of theirs"
        return f"{errors}, {self.calls} calls reach the kernels"


MEASURED: defaultdict[str, Measured] = defaultdict(Measured)


def _measured() -> Measured:
    """Of the file whose test is running."""
    return MEASURED[os.environ["PYTEST_CURRENT_TEST"].partition("::")[0]]


def project(distribution: str, *modules: str) -> Any:
    """The modules of a project; where it is not installed the tests of the file are skipped. Its
    warnings while it is imported are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = f"needs {distribution}: pip install {distribution}"
        found = [pytest.importorskip(name, reason=reason) for name in modules]
    return found if len(found) > 1 else found[0]


def inputs(shapes: Sequence[tuple[int, ...]], dtype: Any, seed: int = 0) -> tuple[Array, ...]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(jax.random.normal(*x).astype(dtype) for x in zip(keys, shapes, strict=True))


def with_gradients(function: Callable[..., Array], arrays: Sequence[Any]) -> list[np.ndarray]:
    """The result, and the gradients of its product with fixed random numbers; any pytrees."""

    @jax.jit
    def run(arrays: Any) -> Any:
        out, pullback = jax.vjp(function, *arrays)
        cotangent = jax.random.normal(jax.random.key(7), out.shape).astype(out.dtype)
        return out, pullback(cotangent)

    return [np.asarray(x, np.float32) for x in jax.tree.leaves(run(tuple(arrays)))]


def assert_same_as_theirs(ours: Any, theirs: Any, arrays: Sequence[Any]) -> None:
    """In fp32: outputs and gradients within 1e-5 of the largest number of each array."""
    with jax.default_matmul_precision("highest"):
        found, wanted = with_gradients(ours, arrays), with_gradients(theirs, arrays)
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        largest = max(1, np.abs(y).max(initial=0))
        error = np.abs(x - y).max(initial=0) / largest
        _measured().fp32 = max(_measured().fp32, error)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * largest)


def assert_no_further(
    ours: Any, theirs: Any, arrays: Sequence[Any], *, exact: Any = None, pooled: bool = False
) -> None:
    """In bf16: outputs and gradients no further from theirs in fp32 than theirs in bf16 are, on
    average over each array.

    Args:
        exact: theirs in fp32, where it is another function.
        pooled: on average over all numbers of all gradients, for layers whose biases have few.
    """
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), tuple(arrays))
    with jax.default_matmul_precision("highest"):
        wanted = with_gradients(exact or theirs, wide)
    found, limits = with_gradients(ours, arrays), with_gradients(theirs, arrays)
    errors = [(np.abs(x - z), np.abs(y - z)) for x, y, z in zip(found, limits, wanted, strict=True)]
    if pooled:
        gradients = zip(*errors[1:], strict=True)
        error, limit = (np.concatenate([x.ravel() for x in each]) for each in gradients)
        errors[1:] = [(error, limit)]
    for pair in errors:  # equal ones are as near, whatever the order of their sums
        error, limit = (x.mean(dtype=float) for x in pair)
        _measured().bf16 = max(_measured().bf16, error / limit if limit else 0)
        assert error <= limit * (1 + 1e-6)


def assert_runs_kernels(function: Any, arrays: Sequence[Any], calls: int | None = 1) -> None:
    """Lowered for a Hopper GPU, forward and gradient are one kernel each for each call of attention,
    beside those that turn segment ids into intervals and masks into bits. (The fixture `on_cpu` hides
    the GPUs.)

    Args:
        calls: of attention; None where a dense mask decides, when it runs, which of several calls does.
    """

    def run(arrays: Any) -> Any:
        out, pullback = jax.vjp(function, *arrays)
        return out, pullback(out)

    found = targets(lower(run, tuple(arrays)))
    beside = {_targets.SEGMENT_INTERVALS, _targets.MASK_BITS}
    found = sorted(x for x in found if x not in beside)
    if calls is None:
        assert {_ffi.BWD, _ffi.FWD} <= set(found)
    else:
        assert found == [_ffi.BWD] * calls + [_ffi.FWD] * calls
    _measured().calls += 1
