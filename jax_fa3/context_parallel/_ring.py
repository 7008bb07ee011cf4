"""Ring attention (Liu et al., arXiv 2310.01889): K and V go from device to device, and while one
part is worked on the next one is under way. Memory is linear in the length of one device's part.

Each step's result, for one device's keys, is joined in fp32 with that of the steps before. The
backward goes round the ring as well: with the log-sum-exp and out of all keys, each step adds its
own part to every gradient; those of K and V travel with them, in fp32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._arguments import Implementation
from .._problem import Config, Masks
from .._varying import vary_together
from . import _steps
from ._layout import Layout
from ._masks import of_one_part


def forward(
    implementation: Implementation | None,
    config: Config,
    layout: Layout,
    operands: tuple[Array, ...],
    masks: Masks,
) -> tuple[Array, Array]:
    """out [B, T, N, V] and lse [B, N, T]; everything of one device, masks from of_this_device."""
    query, *part = operands
    total: Any = None
    for step in range(layout.size):
        is_last = step + 1 == layout.size
        arriving = None if is_last else layout.send(part)
        keys = of_one_part(layout, masks, layout.device(step), part[0].shape[1])
        config = dataclasses.replace(config, partial=not is_last)
        call = vary_together(((query, *part), keys, total))
        total = _steps.forward(implementation, config, *call)
        if not is_last:
            part, total = _when_done(arriving, total)
    return total


def backward(
    implementation: Implementation | None,
    config: Config,
    layout: Layout,
    residuals: tuple[tuple[Array, ...], Masks, Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, ...]:
    """dq, dk, dv."""
    config = dataclasses.replace(config, partial=True)
    (query, *part), masks, out, lse = residuals
    dout, dlse = cotangents
    dlse = dlse - jnp.swapaxes((dout.astype(lse.dtype) * out).sum(-1), 1, 2)
    dtypes = [x.dtype for x in part]
    dquery: Any = None
    dpart: Any = None
    for step in range(layout.size):
        is_last = step + 1 == layout.size
        # The next part, and the gradients so far of the one that is here now.
        arriving, sums = layout.send((None if is_last else part, dpart))
        keys = of_one_part(layout, masks, layout.device(step), part[0].shape[1])
        call = vary_together(((query, *part), keys, lse, dout, dlse, dquery))
        dquery, *dpart = _steps.backward(implementation, config, is_last, *call)
        dpart = dpart if sums is None else jax.tree.map(jnp.add, sums, dpart)
        if not is_last:
            part, (dquery, dpart) = _when_done(arriving, (dquery, dpart))
    dpart = [x.astype(dtype) for x, dtype in zip(dpart, dtypes, strict=True)]
    return dquery, *(layout.send(dpart) if layout.size > 1 else dpart)  # the last hop leads home


def _when_done(arriving: Any, results: Any) -> Any:
    """Both, the next part only when this step's results are there: else XLA could send all parts at
    once, and hold as many. (On GPUs; XLA for CPUs takes barriers out before it schedules.)"""
    return lax.optimization_barrier((arriving, results))
