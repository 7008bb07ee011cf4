"""What every custom call takes: operands, attributes (cpp/ffi_call.h), operands that become results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._problem import Config, Masks
from ._varying import vary_as, vary_together

_UNBOUNDED = 2**62
_FARTHEST = 2**61  # far beyond every int32 position, and sums with one still fit int64


def custom_call(
    target: str,
    results: Any,
    attributes: dict[str, Any],
    *operands: Array,
    aliases: dict[int, int] | None = None,
) -> list[Array]:
    """aliases: operands, by their place, that become results where they are."""
    varying = vary_together(operands)
    call = jax.ffi.ffi_call(target, results, input_output_aliases=aliases)
    found = call(*varying, **attributes)
    return [vary_as(x, varying[0]) for x in found]


def mask_operands(masks: Masks) -> list[Array]:
    absent = jnp.zeros(0, jnp.int32)
    return [absent if mask is None else mask for mask in masks]


def attributes_of(
    config: Config,
    num_heads: tuple[int, int],
    first_head: tuple[int, int, int],
    head_dim_v: int,
    first_column_v: int = 0,
) -> dict[str, Any]:
    left, right = map(window_attribute, config.window)
    return {
        "scale": np.float32(config.scale),
        "soft_cap": np.float32(config.logits_soft_cap or 0),
        "window_left": left,
        "window_right": right,
        "num_heads_q": num_heads[0],
        "num_heads_k": num_heads[1],
        "first_head_q": first_head[0],
        "first_head_k": first_head[1],
        "first_head_v": first_head[2],
        "head_dim_v": head_dim_v,
        "first_column_v": first_column_v,
    }


def window_attribute(distance: int | None) -> int:
    return _UNBOUNDED if distance is None else min(max(distance, -_FARTHEST), _FARTHEST)
