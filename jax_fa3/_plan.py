"""What the compiled library decides when a call is traced: the sizes of workspace that depend on it
(cpp/plan.h, cpp/bwd_splits.h). Without the library, and where lengths are symbolic, there is none:
sums over very many keys and rows are less exact then, and few heads do not fill the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax

from ._custom_call import window_attribute
from ._problem import Config, Masks


def long_sums(library: ModuleType | None, key_length: Any, head_dim: int, head_dim_v: int) -> int:
    """fp32 numbers of the forward's workspace for sums over many keys."""
    if library is None or not _fit((key_length, head_dim, head_dim_v)):
        return 0
    return library.fwd_long_sums(key_length, head_dim, head_dim_v)


def splits(library: ModuleType | None, config: Config, masks: Masks, sizes: tuple[Any, ...]) -> int:
    """How many CTAs share the query rows of a block of keys in the backward; 0 if it is one, which
    sums over them in one go.

    Args:
        sizes: B, T, S, N, K, H and V.
    """
    if library is None or not _fit(sizes):
        return 0
    masked = config.window != (None, None) or any(mask is not None for mask in masks)
    window = tuple(map(window_attribute, config.window))
    return library.bwd_splits(sizes, window, masked, config.deterministic_backward)


def _fit(sizes: Sequence[Any]) -> bool:
    """Whether they are known, and not so large that the handlers refuse the call."""
    return all(not jax.export.is_symbolic_dim(n) and n < 2**31 for n in sizes)
