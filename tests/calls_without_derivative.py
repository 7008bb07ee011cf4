"""Calls as those of calls.py, of what has no derivative."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from calls import BROKEN, MASKS, PADDING, TWO, B, H, T
from flax import linen as nn
from masks import ints

import jax_fa3
import jax_fa3.flax
from jax_fa3 import context_parallel, fp8


def _quantized(implementation: Any, *qkv: Any) -> Any:
    options: Any = {"implementation": implementation}
    how: Any = options | {"signs": fp8.random_signs(0, H), "lengths": ints(9, 16)}
    arrays, scales = zip(*(fp8.quantize(x, **how) for x in qkv), strict=True)
    options |= {**TWO, **PADDING, "is_causal": True}
    return fp8.quantized_dot_product_attention(*arrays, *scales, **options)


def _rest(implementation: Any, query: Any, *_: Any) -> Any:
    """Those without implementation or derivative."""
    zigzag = context_parallel.to_zigzag(query, 2)
    lses = query[..., 0].astype(jnp.float32)
    return (
        jax_fa3.key_intervals(T, T, implementation=implementation, **MASKS["all"]),
        jax_fa3.key_intervals(T, T, implementation=implementation, **BROKEN, padding_segment_id=2),
        jax_fa3.flax.mask_to_intervals(nn.make_causal_mask(jnp.ones((B, T)))),
        jax_fa3.flax.mask_to_intervals(jnp.asarray(np.arange(B * T).reshape(B, 1, 1, T) % 3)),
        fp8.hadamard_transform(query, fp8.random_signs(jax.random.key(0), H)),
        context_parallel.merge(jnp.stack([query] * 2), jnp.stack([lses, -lses])),
        context_parallel.from_zigzag(zigzag, 2),
        context_parallel.zigzag_positions(T, 2),
    )


WITHOUT_DERIVATIVE: dict[str, Callable[..., Any]] = {"quantized": _quantized, "rest": _rest}
