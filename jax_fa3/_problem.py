"""What one call computes, as the other modules pass it on. Twin of cpp/problem.h."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Implementation = Literal["fa3", "xla"]
Implementations = Implementation | Sequence[Implementation | None]  # as users say it, or None
Window = tuple[int | None, int | None]

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
E4M3_MAX = 448.0  # its greatest number; it has no infinity


class Masks(NamedTuple):
    """The run-time arrays that say which keys a row sees, each int32 or None. A pytree."""

    query_offset: Array | None = None  # [1] or [B]; a static one is folded into Config.window
    query_seq_lengths: Array | None = None  # [B]
    key_value_seq_lengths: Array | None = None  # [B]
    key_begin: Array | None = None  # [B, T]; segments are converted into these two
    key_end: Array | None = None  # [B, T]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegmentIds:
    """Rows see keys of their own id. A pytree of the two arrays, of any integer dtypes, unsigned too:
    that is why an id which means padding is a field of its own, and not replaced by -1."""

    query: Array  # [B, T]
    key: Array  # [B, S]
    # An id >= 0 whose rows and keys are padding, as those of negative ids are.
    padding: int | None = dataclasses.field(default=None, metadata={"static": True})


def wide(dtype: np.dtype) -> np.dtype:
    """fp32, or fp64 for fp64: in which numbers of this dtype are computed with and summed."""
    return jnp.dtype(dtype if dtype == jnp.float64 else jnp.float32)


@dataclasses.dataclass(frozen=True)
class Config:
    """The static part of one call to the kernels; hashable.

    window: row i sees key j only if i + query_offset - left <= j <= i + query_offset + right;
    None is unbounded. is_causal, local_window_size and a static query_offset are folded in as
    Python integers of any size.
    partial: the keys are only a part of those that the rows see, or the rows of those that see the
    keys. Results that are summed elsewhere, out, dk and dv, are fp32; what the backward is given of
    the forward, out and lse, is of all keys.
    checkpoint_names: the user's, besides RESIDUAL_NAMES: of out, and of lse and lse_low; or none.
    soft_cap_last: the soft cap comes after bias, slopes and relative_bias, if there are any, which
    plain JAX alone can do.
    dropout: of _dropout.WHOLE weights so many are dropped; 0 where there are no Operands.dropout.
    """

    scale: float
    window: Window
    logits_soft_cap: float | None
    deterministic_backward: bool
    partial: bool = False
    checkpoint_names: tuple[str, str] | None = None
    dropout: int = 0
    soft_cap_last: bool = False


class Sizes(NamedTuple):
    """The sizes of one call; B is 1 where the arguments have no batch axis."""

    batch: int
    query_length: int
    key_length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int


def fold_window(size: Window | None, is_causal: bool, query_offset: int | None) -> Window:
    """Config.window of these arguments; query_offset is None if it is a run-time value."""
    left, right = (None, None) if size is None else size
    if is_causal:
        right = 0 if right is None else min(right, 0)
    offset = query_offset or 0
    return (
        None if left is None else left - offset,
        None if right is None else right + offset,
    )
