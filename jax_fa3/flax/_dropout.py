"""The layers' dropout: whether a call has it, and its key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._checks import wrong


def arguments(
    layer: Any, key: Callable[[], Any] | None, deterministic: bool | None
) -> dict[str, Any]:
    """Of attention, for a layer with dropout_rate and deterministic."""
    if not layer.dropout_rate:
        return {}
    off = layer.deterministic if deterministic is None else deterministic
    if off is None:
        raise wrong("deterministic", None, "True or False, of the layer or of this call")
    if off:
        return {}
    if key is None:
        raise wrong("rngs", None, "flax.nnx.Rngs with a stream 'dropout'")
    return {"dropout_rate": layer.dropout_rate, "dropout_key": key()}
