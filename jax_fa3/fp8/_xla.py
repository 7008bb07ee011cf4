"""The FP8 kernel's attention in plain JAX: the same e4m3 numbers and scales, multiplied in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _xla
from .._operands import Operands
from .._problem import Config, Masks
from . import _transposed
from ._ffi import BLOCK, Transposed


def attention(
    config: Config,
    dtype: np.dtype,
    tensors: Sequence[Any],
    scales: Sequence[Array],
    masks: Masks,
    value_mean: Array | None = None,
    sinks: Array | None = None,
) -> tuple[Array, Array]:
    """What _ffi.fwd computes, in fp32 from the dequantized arrays; memory linear in T and S."""
    q8, k8, v8 = tensors
    if isinstance(v8, Transposed):
        v8 = _transposed.undone(v8.value, k8.shape[1])
    query, key, value = map(dequantized, (q8, k8, v8), scales)
    # A bad scale of value's must not reach rows that do not see it, but 0 * NaN is NaN; scores of keys
    # that a row does not see are no part of any product.
    bad = _rows(jnp.isnan(_checked(scales[2])), value.shape[1])[..., None]
    key, value = jnp.where(bad, jnp.nan, key), jnp.where(bad, 0, value)
    value += 0 if value_mean is None else value_mean[:, None]
    with jax.default_matmul_precision("highest"):
        out, lse = _xla.attention(config, Operands(query, key, value, sinks=sinks), masks)
    return out.astype(dtype), lse


def dequantized(x: Array, scales: Array) -> Array:
    """[B, T, N, H] in fp32; NaN where the scale is not positive and finite."""
    return x.astype(jnp.float32) * _rows(_checked(scales), x.shape[1])[..., None]


def _checked(scales: Array) -> Array:
    return jnp.where((scales > 0) & (scales < jnp.inf), scales, jnp.nan)


def _rows(x: Array, length: int) -> Array:
    """[B, blocks, N] to [B, length, N]."""
    return jnp.repeat(x, BLOCK, axis=1)[:, :length]
