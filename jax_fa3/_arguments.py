"""The user's arguments checked at trace time, from shapes, dtypes and static values alone.

Every error names the argument, the value found and the value wanted. What no implementation can
take is refused here with a ValueError; what only the kernels cannot take, _dispatch refuses.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypedDict, Unpack

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from . import _dropout, _relative_bias
from ._checks import Integers, check_names, integers, refuse_dense, static_bool, wrong
from ._dispatch import checked_implementation
from ._integers import clamped, offset_and_window
from ._integers import segment_ids as known_to_fit
from ._mask_bits import as_bool
from ._operands import PER_HEAD, Call, Operands
from ._problem import Config, Implementations, Masks, SegmentIds, Sizes, Window, fold_window, wide
from ._tensors import separate
from ._values import (
    checked_segment_ids,
    checkpoint_names,
    dense,
    floating_dtype,
    offset_of,
    per_head,
    score_scale,
    several_intervals,
    soft_cap,
    static_sharding,
    window_size,
)


class MaskArrays(TypedDict, total=False):
    """The arguments that say who sees whom, those that differ from call to call."""

    query_offset: Integers
    query_seq_lengths: Integers | None
    key_value_seq_lengths: Integers | None
    query_segment_ids: Integers | None
    key_value_segment_ids: Integers | None
    key_begin: Integers | None
    key_end: Integers | None


class MaskArguments(MaskArrays, total=False):
    """All of them."""

    is_causal: bool
    local_window_size: int | Window | None
    padding_segment_id: int | None


class Options(MaskArguments, total=False):
    """The keyword arguments that all public functions share, spelled out for type checkers."""

    scale: ArrayLike | None
    logits_soft_cap: float | None
    soft_cap_last: bool
    sinks: ArrayLike | None
    alibi_slopes: ArrayLike | None
    relative_bias: ArrayLike | None
    deterministic_backward: bool
    implementation: Implementations | None
    sharding: NamedSharding | PartitionSpec | None
    checkpoint_name: str | tuple[str, str] | None
    compute_dtype: DTypeLike | None
    dropout_rate: float | None
    dropout_key: ArrayLike | None


# Those that become operands besides query, key and value.
_OTHER_OPERANDS = "bias", "mask", "relative_bias", "dropout_rate", "dropout_key", *PER_HEAD


def parse(
    operands: Operands,
    batched: bool,
    *,
    implementation: Implementations | None = None,
    sharding: NamedSharding | PartitionSpec | None = None,
    compute_dtype: DTypeLike | None = None,
    return_residual: bool = False,
    **options: Any,
) -> Call:
    """The call, checked; options: bias, mask, and the others of Options."""
    others = {name: options.pop(name, None) for name in _OTHER_OPERANDS}
    check_names(options, Options.__annotations__)
    wanted = checked_implementation(implementation)
    own_dtype, operands = operands.query.dtype, _in_one_dtype(operands, compute_dtype)
    sizes, names = operands.sizes, options.keys() & MaskArguments.__annotations__
    arguments: Any = {name: options.pop(name) for name in names}
    intervals = several_intervals(sizes, batched, arguments)
    dtype, offset = wide(operands.query.dtype), arguments.get("query_offset", 0)
    table = _relative_bias.of_all_distances(others["relative_bias"], sizes, offset, batched, dtype)
    masks, window, segment_ids = parse_masks(sizes, batched, **arguments)
    config, scale = _config(window, sizes.head_dim, **options)
    dropout, words = _dropout.checked(others["dropout_rate"], others["dropout_key"])
    config = dataclasses.replace(config, dropout=dropout)
    full = sizes.batch, sizes.num_heads, sizes.query_length, sizes.key_length
    of_heads = {
        name: None if (given := per_head(name, others[name], sizes.num_heads)) is None
        else given[None].astype(dtype)
        for name in PER_HEAD
    }  # fmt: skip
    given = dense("mask", others["mask"], full)
    if given is not None and intervals is not None:
        given &= as_bool(intervals, sizes.key_length)
    operands = dataclasses.replace(
        operands,
        **of_heads,
        relative_bias=table,
        bias=dense("bias", others["bias"], full),
        mask=intervals if given is None else given,
        scale=scale,
    )
    where = static_sharding("sharding", sharding, batched)
    with_lse = static_bool("return_residual", return_residual)
    result_dtype = None if compute_dtype is None else own_dtype
    results = with_lse, result_dtype, words
    return Call(operands, masks, segment_ids, config, wanted, where, batched, *results)


def _in_one_dtype(operands: Operands, compute_dtype: DTypeLike | None) -> Operands:
    """Query, key and value, cast to compute_dtype unless it is None."""
    if compute_dtype is not None:
        dtype = floating_dtype("compute_dtype", compute_dtype)
        return jax.tree.map(lambda x: x.astype(dtype), operands)
    dtype = operands.query.dtype
    for name, x in (("key", operands.key), ("value", operands.value)):
        if x is not None and x.dtype != dtype:
            wanted = f"{dtype}, as query has, or compute_dtype=jnp.bfloat16 for all of them"
            raise wrong(name, f"dtype {x.dtype}", wanted)
    return operands


def parse_without_dense(
    who: str, *tensors: ArrayLike, instead_of_scale: str = "query", **options: Any
) -> Call:
    """The call of query, key and value, for functions that with "xla" take no more than the kernels:
    no terms of the scores, dense mask or several intervals a row, no dropout, and no traced scale."""
    refuse_dense(options, who)
    call = parse(*separate(*tensors), **options)
    if call.operands.mask is not None:
        wanted = f"wanted one: jax_fa3.dot_product_attention alone takes more, not {who}"
        raise NotImplementedError(f"key_begin: got several intervals a row, {wanted}")
    for name in ("alibi_slopes", "relative_bias"):
        if getattr(call.operands, name) is not None:
            wanted = f"wanted none: jax_fa3.dot_product_attention alone takes them, not {who}"
            raise NotImplementedError(f"{name}: got some, {wanted}")
    if call.operands.scale is not None:
        wanted = f"wanted a static float: multiply {instead_of_scale} by it and pass scale=1.0"
        raise NotImplementedError(f"scale: got an array, {wanted}")
    if call.config.dropout:
        found, wanted = f"got {options['dropout_rate']}", "wanted 0 or None"
        way = "jax_fa3.dot_product_attention has it"
        raise NotImplementedError(f"dropout_rate: {found}, {wanted}: {who} has no dropout, {way}")
    return call


def parse_masks(
    sizes: Sizes, batched: bool, **arguments: Unpack[MaskArguments]
) -> tuple[Masks, Window, SegmentIds | None]:
    """(masks, window, segment ids): who sees whom. Of sizes only B, T and S count; the caller turns
    the segment ids, if there are any, into intervals."""
    check_names(arguments, MaskArguments.__annotations__)
    batch, query_length, key_length = sizes[:3]

    def given(name: str, *shape: int) -> Array | np.ndarray | None:
        x: Any = arguments.get(name)
        return None if x is None else integers(name, x, shape, batched)

    def bound(name: str, *shape: int) -> Array | None:
        found = given(name, *shape)
        return None if found is None else clamped(found)

    static_offset, offset = offset_of(arguments.get("query_offset", 0), batch, batched)
    causal = static_bool("is_causal", arguments.get("is_causal", False))
    window = fold_window(window_size(arguments.get("local_window_size")), causal, static_offset)
    if offset is None or window == (None, None):  # then nothing depends on the offset
        narrow_offset = None
    else:
        narrow_offset, window = offset_and_window(offset, window)
    query_ids = given("query_segment_ids", batch, query_length)
    key_ids = given("key_value_segment_ids", batch, key_length)
    ids = checked_segment_ids(query_ids, key_ids, arguments.get("padding_segment_id"))
    masks = Masks(
        narrow_offset,
        bound("query_seq_lengths", batch),
        bound("key_value_seq_lengths", batch),
        bound("key_begin", batch, query_length),
        bound("key_end", batch, query_length),
    )
    return masks, window, None if ids is None else known_to_fit(*ids)


def _config(
    window: Window,
    head_dim: int,
    *,
    scale: ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    soft_cap_last: bool = False,
    deterministic_backward: bool = False,
    checkpoint_name: str | tuple[str, str] | None = None,
) -> tuple[Config, Array | None]:
    """The static part of a call, and the scale if it is not static."""
    factor = score_scale(scale, head_dim)
    static, traced = (1.0, factor) if isinstance(factor, Array) else (factor, None)
    deterministic = static_bool("deterministic_backward", deterministic_backward)
    cap, names = soft_cap(logits_soft_cap), checkpoint_names(checkpoint_name)
    last = static_bool("soft_cap_last", soft_cap_last)
    config = Config(static, window, cap, deterministic, checkpoint_names=names, soft_cap_last=last)
    return config, traced
