"""Query rows whose segment is not one contiguous run of keys: their mark in the intervals, and NaN.

Their results are NaN. So is the derivative, but of tangents and cotangents that are 0 it is 0: a
loss that leaves such rows out must not bring their NaN back.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike

from ._guards import Primitive

# The interval that marks such a row: both values exactly, which nobody writes by accident. Any other
# pair of integers, int32's extremes too, is an ordinary interval. Twin of cpp/common/mask.h.
BROKEN_BEGIN, BROKEN_END = 0x7FFA3FA3, -0x7FFA3FA3


def is_broken(begin: Array, end: Array) -> Array:
    """Where the interval is the mark."""
    return (begin == BROKEN_BEGIN) & (end == BROKEN_END)


def marked(broken: Array, begin: Array, end: Array) -> tuple[Array, Array]:
    """The intervals, with the mark where broken and nowhere else."""
    end = jnp.where(is_broken(begin, end), 0, end)  # empty as it was, but not by these two numbers
    return jnp.where(broken, BROKEN_BEGIN, begin), jnp.where(broken, BROKEN_END, end)


def nan_rows(broken: Array, query: Array, columns: int) -> tuple[Array, Array]:
    """The results of rows that see nothing: NaN where broken, else 0; functions of query.

    Args:
        broken: bool, of as many axes as query, the last of size 1.
        query: [..., H]

    Returns those of out, [..., columns], and of the log-sum-exp, [..., 1].
    """
    row = times_nan(jnp.where(broken, query, 0)).sum(-1, keepdims=True)
    row += jnp.where(broken, jnp.nan, jnp.zeros_like(row))
    # Once more in each column: cotangents must not cancel before they have become NaN.
    return times_nan(jnp.broadcast_to(row, (*row.shape[:-1], columns))), row


def touched(dout: Array, dlse: Array) -> Array:
    """bool [...], the rows whose cotangents, [..., V] and [...], are not all 0."""
    return (dout != 0).any(-1) | (dlse != 0)


def row_sums(dout: Array, out: Array, dtype: DTypeLike) -> Array:
    """rowsum(dout * out), [B, N, T] of [B, T, N, V]; 0 where dout is, for out may be NaN there."""
    products = dout.astype(dtype) * out.astype(dtype)
    return jnp.swapaxes(jnp.where(dout == 0, 0, products).sum(-1), 1, 2)


def _nan_where_not_0(x: Array) -> Array:
    zero = lax.full_like(x, 0)
    return lax.select(lax.ne(x, zero), lax.full_like(x, jnp.nan), zero)


# x times NaN, elementwise, but 0 for 0. As a linear map, which it is to every derivative, it is its
# own transpose. A product would make NaN of 0, and a where has no derivative that is NaN.
_times_nan = Primitive("jax_fa3_times_nan")
_times_nan.def_impl(_nan_where_not_0)
_times_nan.def_abstract_eval(lambda x: x)
mlir.register_lowering(_times_nan, mlir.lower_fun(_nan_where_not_0, multiple_results=False))
batching.defvectorized(_times_nan)
ad.deflinear2(_times_nan, lambda cotangent, _: [_times_nan.bind(cotangent)])
times_nan = _times_nan.bind
