"""What is computed from a cache has no derivative, and says so."""

from __future__ import annotations

from typing import Any, NoReturn

import jax

_MESSAGE = (
    "jax_fa3.kv_cache has no derivatives: differentiate jax_fa3.dot_product_attention, which takes the "
    "same masks, or use jax.lax.stop_gradient"
)


@jax.custom_jvp
def not_differentiable(x: Any) -> Any:
    """x, a pytree."""
    return x


@not_differentiable.defjvp
def _refuse(primals: Any, tangents: Any) -> NoReturn:
    raise NotImplementedError(_MESSAGE)
