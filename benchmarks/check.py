"""Is a result right? A slice of it against fp32 maths in NumPy, away from the GPU's own rounding."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .points import Point

ROWS = 64
GRADIENT_ROWS = 2048  # at a time, at most
FACTOR = (
    2.0  # the tests' rule, too: twice the error of the same maths with roundings to the input dtype
)
ATOL = 1e-5  # outputs over 16,384 keys are as small as 1e-2


class WrongResult(Exception):
    """A contender's output is further from the truth than its dtype explains."""


class Rounding(NamedTuple):
    """What a right result may be off by: what is rounded on the way, by functions from fp32 to fp32."""

    scores: Callable[[np.ndarray], np.ndarray]
    weights: Callable[[np.ndarray], np.ndarray]  # exp(score - the row's highest score)
    out: Callable[[np.ndarray], np.ndarray]
    slack: float = 0.0  # and this share of the largest output


def nearest(x: np.ndarray, dtype: Any) -> np.ndarray:
    """The nearest numbers of `dtype`, in fp32."""
    return x.astype(jnp.dtype(dtype)).astype(np.float32)


def _all_to(dtype: str) -> Rounding:
    to_dtype = partial(nearest, dtype=dtype)
    return Rounding(to_dtype, to_dtype, to_dtype)


def _attention(query, key, value, visible, scale, rounding: Rounding):
    """[R,H], [S,H], [S,V], bool [R,S] -> [R,V] in fp32."""
    scores = np.where(visible, rounding.scores(query @ key.T * scale), -np.inf)
    peak = np.max(scores, axis=1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0))
    total = np.sum(weights, axis=1, keepdims=True)
    return rounding.out(rounding.weights(weights) @ value / np.where(total > 0, total, 1))


@jax.jit
def _head(x, b, n):
    return x[b, :, n]


def fetch(x: jax.Array, b: int, n: int) -> np.ndarray:
    """One head of one batch entry, fp32. Compiled once per shape: b and n are traced."""
    return np.asarray(_head(x, b, n)).astype(np.float32)


def check_forward(
    point: Point,
    inputs: tuple[jax.Array, ...],
    out: jax.Array,
    rounding: Rounding | None = None,
    rows: int = ROWS,
) -> float:
    """Compares three groups of `rows` rows, of the first and last head of the first and last batch entry.

    `rounding`: default of everything to the point's dtype.
    Returns the worst error as a share of what is allowed. Raises WrongResult above 1, or at a NaN.
    """
    rounding = rounding or _all_to(point.dtype)
    query, key, value = inputs
    shape = (point.batch, point.seqlen, point.num_heads_q, point.head_dim_v)
    if out.shape != shape:
        raise WrongResult(f"{point.name}: output has shape {out.shape}, expected {shape}")
    scale = point.head_dim**-0.5
    group = point.num_heads_q // point.num_heads_k
    rows = min(rows, point.seqlen)
    starts = sorted({0, (point.seqlen - rows) // 2, point.seqlen - rows})
    worst = 0.0
    for b in sorted({0, point.batch - 1}):
        for n in sorted({0, point.num_heads_q - 1}):
            k, v = (fetch(x, b, n // group) for x in (key, value))
            q_head, out_head = fetch(query, b, n), fetch(out, b, n)
            for start in starts:
                span = slice(start, start + rows)
                q, got = q_head[span], out_head[span]
                visible = point.visible(span)
                truth = _attention(q, k, v, visible, scale, _all_to("float32"))
                rough = _attention(q, k, v, visible, scale, rounding)
                allowed = FACTOR * np.max(np.abs(rough - truth)) + ATOL
                allowed += rounding.slack * np.max(np.abs(truth))
                error = np.max(np.abs(got - truth))
                if not error <= allowed:  # a NaN fails too
                    raise WrongResult(
                        f"{point.name}: batch {b}, head {n}, rows {start} to {start + rows - 1}: "
                        f"error {error:.2e}, allowed {allowed:.2e}"
                    )
                worst = max(worst, float(error / allowed))
    return worst


# cuBLAS's first choice: to search for the fastest matmul takes longer than all of the check.
_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@partial(jax.jit, static_argnames="dtype", compiler_options=_OPTIONS)
def _gradients(query, key, value, dout, visible, scale, exact, *, dtype):
    """Of one head, fp32 on the device; scores, probabilities, out and gradients rounded to `dtype`
    unless `exact`. Not all query rows at once: 128k of them would have 64 GiB of scores."""

    def rounded(x):
        # The barrier keeps XLA from dropping both conversions.
        return jnp.where(exact, x, lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32))

    query, key, value, dout = (x.astype(jnp.float32) for x in (query, key, value, dout))

    def some_rows(sums, rows):
        dk, dv = sums
        query, dout, visible = rows
        scores = jnp.where(visible, rounded(query @ key.T * scale), -jnp.inf)
        weights = rounded(jax.nn.softmax(scores, axis=1))
        delta = (dout * rounded(weights @ value)).sum(1, keepdims=True)
        dscores = rounded(weights * (dout @ value.T - delta)) * scale
        return (dk + dscores.T @ query, dv + weights.T @ dout), dscores @ key

    size = max(n for n in range(1, GRADIENT_ROWS + 1) if query.shape[0] % n == 0)
    blocks = [x.reshape(-1, size, *x.shape[1:]) for x in (query, dout, visible)]
    zeros = jnp.zeros_like(key), jnp.zeros_like(value)
    (dk, dv), dq = lax.scan(some_rows, zeros, blocks)
    return dq.reshape(query.shape), dk, dv


def check_backward(
    point: Point, inputs: tuple[jax.Array, ...], grads: tuple[jax.Array, ...]
) -> float:
    """Compares dq, dk and dv of the last KV head of the last batch entry; otherwise check_forward."""
    b, n = point.batch - 1, point.num_heads_k - 1
    group = point.num_heads_q // point.num_heads_k
    heads = [n * group + i for i in range(group)]
    visible = jnp.asarray(point.visible(slice(None)))

    def expected(exact: bool) -> list[np.ndarray]:
        key, value = (_head(x, b, n) for x in inputs[1:3])
        with jax.default_matmul_precision("highest"):
            found = [
                _gradients(
                    *(_head(inputs[0], b, head), key, value, _head(inputs[3], b, head), visible),
                    point.head_dim**-0.5,
                    exact,
                    dtype=point.dtype,
                )
                for head in heads
            ]
        dq, dk, dv = ([np.asarray(x) for x in xs] for xs in zip(*found, strict=True))
        return [np.stack(dq), sum(dk), sum(dv)]  # pyright: ignore

    got = [np.stack([fetch(grads[0], b, head) for head in heads])]
    got += [fetch(x, b, n) for x in grads[1:3]]
    worst = 0.0
    cases = zip(("dq", "dk", "dv"), got, expected(True), expected(False), strict=True)
    for name, x, truth, rounded in cases:
        allowed = FACTOR * np.max(np.abs(rounded - truth)) + np.max(np.abs(truth)) * 2**-9
        error = np.max(np.abs(x - truth))
        if not error <= allowed:  # a NaN fails too
            raise WrongResult(f"{point.name}: {name}: error {error:.2e}, allowed {allowed:.2e}")
        worst = max(worst, float(error / allowed))
    return worst


def check_intervals(point: Point, inputs: tuple[jax.Array, ...], intervals) -> float:
    """The conversion of segments must be exact. Returns 0 or raises WrongResult."""
    names = ("key_begin", "key_end")
    for name, got, wanted in zip(names, intervals, point.intervals(), strict=True):
        if not np.array_equal(np.asarray(got)[0], wanted):
            raise WrongResult(f"{point.name}: {name} differs from the documents' bounds")
    return 0.0
