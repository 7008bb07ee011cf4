"""What the GPU tests of jax_fa3.kv_cache share: how near results must be, and many calls in one
program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kv_cases import Case, Inputs
from modes import strict

from jax_fa3 import kv_cache


def run_together(calls: list[dict[str, Any]]) -> tuple[Any, Any]:
    """What kv_cache.dot_product_attention gives for each of these arguments, and what it gives then."""
    arrays = [
        {k: x for k, x in call.items() if isinstance(x, np.ndarray | jax.Array)} for call in calls
    ]
    static = [
        {k: x for k, x in call.items() if k not in y} for call, y in zip(calls, arrays, strict=True)
    ]

    @jax.jit
    def program(arrays: Any) -> Any:
        both = zip(arrays, static, strict=True)
        attend: Any = kv_cache.dot_product_attention
        return [attend(**x, **y, return_residual=True) for x, y in both]

    with strict():
        return program(arrays), program(arrays)


def twice(cases: list[Case], dtype: Any) -> dict[str, Any]:
    """Inputs of the cases, and what the kernel gives twice: of all in one program, as it takes longest
    to compile."""
    inputs = [Inputs(case, dtype) for case in cases]
    found, again = run_together([{**x.arguments(), "implementation": "fa3"} for x in inputs])
    return dict(zip(map(str, cases), zip(inputs, found, again, strict=True), strict=True))


def assert_near(inputs: Inputs, found: Any, wanted: Any = None) -> None:
    """As near as weights and results that are rounded to the dtype can be sure to be."""
    case = inputs.case
    unit = float(jnp.finfo(inputs.dtype).eps) / 2
    out, lse = (np.asarray(x, np.float64) for x in found)
    out, lse = out.reshape(-1, *out.shape[-2:]), lse.reshape(-1, lse.shape[-1])
    np.testing.assert_array_equal(out[case.rows :], 0)
    np.testing.assert_array_equal(lse[case.rows :], -np.inf)
    exact_out, exact_lse = wanted or inputs.wanted()
    key, value = (
        x * y[..., None] for x, y in zip((inputs.key, inputs.value), inputs.scale, strict=True)
    )
    largest = np.nanmax(np.abs(value), initial=0)
    factor = 1 if case.options.get("logits_soft_cap") is None else 2
    norms = [np.nanmax(np.linalg.norm(x, axis=-1), initial=0) for x in (inputs.query, key)]
    of_score = 2.0**-22 * norms[0] * norms[1] * case.options.get("scale", case.H**-0.5)
    of_score += 0 if factor == 1 else 2.0**-10 * case.options["logits_soft_cap"]
    limit = (factor * 2.02 * unit + 2 * of_score) * largest
    np.testing.assert_allclose(out[: case.rows], exact_out, rtol=0, atol=limit)
    np.testing.assert_allclose(lse[: case.rows], exact_lse, rtol=4e-6, atol=4e-6 + of_score)


def exact(
    query: Any, key: Any, value: Any, rows: np.ndarray, window: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of some rows of one sequence, causal: [t, N, H], [s, K, H] and [s, K, V] in fp64.
    Quicker than Inputs.wanted where it is long."""
    count, heads, dim = query.shape
    length, kv_heads, _ = key.shape
    group = heads // kv_heads
    out, lse = np.empty((len(rows), heads, value.shape[-1])), np.empty((len(rows), heads))
    for first in range(0, len(rows), 128):
        row = rows[first : first + 128]
        position = (length - count + row)[:, None, None]
        begin = 0 if window is None else max(int(position.min()) - window, 0)
        seen = np.arange(begin, int(position.max()) + 1)
        visible = seen <= position
        if window is not None:
            visible &= seen >= position - window
        for k in range(kv_heads):
            own = np.s_[first : first + len(row), k * group : (k + 1) * group]
            scores = query[row, k * group : (k + 1) * group] @ key[seen, k].T * dim**-0.5
            scores[~np.broadcast_to(visible, scores.shape)] = -np.inf
            top = scores.max(-1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            out[own] = weights @ value[seen, k] / total
            lse[own] = (top + np.log(total))[..., 0]
    return out, lse
