"""sow_weights of Flax's layers: the softmax's weights, which the kernels never store."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen, nnx
from jax import Array

from .._attention import dot_product_attention

_NAME = "attention_weights"


def sow(module: Any, batch: tuple[int, ...], query: Array, key: Array, **arguments: Any) -> None:
    """Has the module store the weights [*batch, N, T, S], before dropout as Flax's own, in query's dtype.

    They are the results for values that are unit vectors: the same arguments mean the same, at the cost
    of S * S numbers a head. Where the collection is not wanted, the module drops them, and XLA their
    computation.
    """
    lacking = {"dropout_rate": 0.0, "dropout_key": None}
    arguments |= lacking | {"implementation": "xla", "return_residual": False}
    shape = key.shape[:-1] + key.shape[-3:-2]
    units = jnp.broadcast_to(jnp.eye(shape[-1], dtype=key.dtype)[:, None], shape)
    weights = jnp.swapaxes(dot_product_attention(query, key, units, **arguments), -3, -2)
    weights = weights.reshape(*batch, *weights.shape[1:])
    if isinstance(module, linen.Module):
        module.sow("intermediates", _NAME, weights)
    else:
        module.sow(nnx.Intermediate, _NAME, weights)
