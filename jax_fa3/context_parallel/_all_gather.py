"""Every device gathers all of K and V and attends with its own rows; in the backward again, so that
only its own part is kept. The gradients of K and V are summed by a reduce-scatter in fp32."""

from __future__ import annotations

import dataclasses

from jax import Array

from .. import _autodiff
from .._arguments import Implementation
from .._problem import Config, Masks
from .._varying import vary_together
from ._layout import Layout


def forward(
    implementation: Implementation | None,
    config: Config,
    layout: Layout,
    operands: tuple[Array, ...],
    masks: Masks,
) -> tuple[Array, Array]:
    """out [B, T, N, V] and lse [B, N, T]; everything of one device, masks from of_this_device."""
    query, *part = operands
    call = vary_together(((query, *map(layout.gather, part)), masks))
    out, lse = _autodiff._primal(implementation, config, None, *call)
    return out, lse


def backward(
    implementation: Implementation | None,
    config: Config,
    layout: Layout,
    residuals: tuple[tuple[Array, ...], Masks, Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, ...]:
    """dq, dk, dv."""
    config = dataclasses.replace(config, partial=True)  # dk and dv in fp32
    (query, *part), masks, out, lse = residuals
    call = vary_together(((query, *map(layout.gather, part)), masks, out, lse))
    (dquery, *dpart), _ = _autodiff._backward(implementation, config, None, call, cotangents)
    summed = (layout.scatter_sum(dx).astype(x.dtype) for dx, x in zip(dpart, part, strict=True))
    return dquery, *summed
