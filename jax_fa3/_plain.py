"""What runs in place of the 16-bit kernels in plain JAX: the same operands, the same results."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from . import _sinks, _xla
from ._operands import Operands, Rows
from ._problem import Config, Masks
from ._varying import vary_together


def for_gradient(config: Config, operands: Operands, masks: Masks) -> tuple[Array, ...]:
    """The forward, with what the log-sum-exp lost to rounding: nothing."""
    out, lse = _xla.attention(config, operands, masks)
    return out, lse, jnp.zeros_like(lse)


def backward(config: Config, operands: Operands, masks: Masks, rows: Rows) -> tuple[Array, ...]:
    dq, *dkv = _xla.backward(config, operands, masks, rows)
    grads = operands.joined(dq.astype(operands.query.dtype), *dkv)
    return vary_together((grads, operands))[0]  # without elements they are constants


def backward_by_rows(
    config: Config, operands: Operands, masks: Masks, rows: Rows
) -> tuple[Array, ...]:
    """With the forward's log-sum-exp and out, as the kernels have it, where the backward's own weights
    do not add up to 1."""
    config = dataclasses.replace(config, partial=True)
    sinks, tensors = operands.sinks, dataclasses.replace(operands, sinks=None)
    dtype = operands.query.dtype
    dq, dk, dv = (x.astype(dtype) for x in _xla.backward(config, tensors, masks, rows))
    found = vary_together((operands.joined(dq, dk, dv), tensors))[0]
    return found if sinks is None else (*found, _sinks.gradient(sinks, rows))
