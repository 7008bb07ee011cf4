"""The public function: arguments checked, then one strategy run inside shard_map."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, Unpack, overload

from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from .. import _arguments, _dispatch
from .._arguments import Options
from .._autodiff import Method, without_heads
from .._checks import static_bool, wrong
from .._jitted import jitted
from .._operands import Call, Operands
from .._problem import Masks, SegmentIds
from .._sinks import with_sinks
from .._varying import vary_together
from ._all_gather import AllGather
from ._all_to_all import AllToAll
from ._checks import axis_size, check_lengths, check_replication
from ._layout import Layout
from ._masks import of_this_device
from ._ring import Ring
from ._specs import Specs

Strategy = Literal["ring", "all_gather", "all_to_all"]


# fmt: off
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, *, axis_name: str,
    strategy: Strategy = "ring", zigzag: bool = False, return_residual: Literal[False] = False,
    **options: Unpack[Options],
) -> Array: ...
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, *, axis_name: str,
    strategy: Strategy = "ring", zigzag: bool = False, return_residual: Literal[True],
    **options: Unpack[Options],
) -> tuple[Array, Array]: ...
# fmt: on


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: str,
    strategy: Strategy = "ring",
    zigzag: bool = False,
    sharding: NamedSharding | PartitionSpec | None = None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """jax_fa3.dot_product_attention of sequences that are split over the devices of a mesh axis.

    To be called inside jax.shard_map (check_vma on or off), where the axis is manual, with each
    device's part of every array; or anywhere with the whole arrays and `sharding`. The result is
    that of jax_fa3.dot_product_attention on one device.

    Args:
        query, key, value: as there, T and S being one device's part of the sequence. Device i along
            the axis has part i of n, or with zigzag chunks i and 2n - 1 - i of 2n.
        axis_name: the mesh axis that the sequence is split over; one name.
        strategy: "ring": K and V go round the axis while the kernel works; memory is linear in T
            and S. "all_gather": every device gathers all of K and V, forward and backward.
            "all_to_all": every device gets the whole sequence of 1 / n of the heads; with fewer
            key/value heads than n, or a number that n does not divide, heads are sent in copies.
        zigzag: the arrays are in the order of `to_zigzag`; all of the same rows, segment ids too.
            With "ring" and "all_gather" it gives every device the same work under a causal mask;
            "all_to_all" has that anyway, and copies its arrays once more.
        sharding: of query, as key and value shall be too: [B, T, N, H] split by axis_name alone in
            T, in B and N by other axes or not at all. The call then takes whole arrays. Those that
            lie otherwise, masks too, are moved there; gradients come back as their operand lies.
        options: the other arguments of jax_fa3.dot_product_attention, but bias, mask, several intervals a
            row, alibi_slopes, relative_bias and dropout, none of which it takes. Positions, lengths,
            query_offset, key_begin and key_end mean the whole sequence:
            key_begin [B, T] is of this device's rows, but counts keys of all devices. Arrays [B]
            and scalars are the same on all devices along the axis. scale is static.

    Returns:
        out [B, T, N, V] in query's dtype, and with return_residual the log-sum-exp, fp32 [B, T, N];
        of this device's rows, or whole arrays with `sharding`. First derivatives in reverse mode;
        saved for them are query, key, value, out and the log-sum-exp, of this device alone
        ("all_to_all": the exchanged ones as well), by the names jax_fa3.RESIDUAL_NAMES and
        checkpoint_name.

    Segment ids of all keys (4 bytes each) are gathered. In another order than `zigzag` says, runs of
    them are torn apart, which gives NaN; other arrays do not show their order. Results for parts of the
    keys are merged in fp32.

    Raises:
        ValueError: as jax_fa3.dot_product_attention; no such axis; lengths or heads that the axis
            does not divide; `sharding` that does not fit; key or value known to be the same on all
            devices along the axis, and query not.
        NotImplementedError: what it does not take (above), a traced scale; as
            jax_fa3.dot_product_attention with "fa3".
    """
    call = _arguments.parse_without_dense("context parallelism", query, key, value, **options)
    if strategy not in _STRATEGIES:
        raise wrong("strategy", repr(strategy), "'ring', 'all_gather' or 'all_to_all'")
    size = axis_size(axis_name, sharding)
    layout = Layout(axis_name, size, static_bool("zigzag", zigzag))
    implementation = _dispatch.choose(call.implementation, _dispatch.refusal(call), stacklevel=2)
    method = _STRATEGIES[strategy](implementation, call.config, layout)
    if sharding is None:
        check_lengths(layout, call.operands.sizes)
        check_replication(layout, call.operands.split())
        return _attend(method, None, call)
    assert isinstance(sharding, NamedSharding)  # else refused
    specs = Specs.of(sharding, layout, call.operands.sizes, call.batched)
    return _attend(method, specs, call)


_STRATEGIES: dict[str, Any] = {"ring": Ring, "all_gather": AllGather, "all_to_all": AllToAll}


# Jitted as _dispatch.run is: called eagerly, its steps would otherwise be compiled one by one.
@jitted(static=2)
def _attend(method: Method, specs: Specs | None, call: Call) -> Any:
    """Of each device's own part; with specs the call has whole arrays, which they split."""
    arrays = call.operands, call.masks, call.segment_ids
    local = functools.partial(_of_one_device, method)
    if specs is None:
        return call.finish(*local(*arrays))
    return call.finish(*specs.split(local, *arrays))


def _of_one_device(
    method: Any, operands: Operands, masks: Masks, segment_ids: SegmentIds | None
) -> tuple[Array, ...]:
    """out [B, T, N, V] and lse [B, N, T] of one device's part."""
    device = lax.axis_index(method.layout.axis_name)
    operands, masks, segment_ids, _ = vary_together((operands, masks, segment_ids, device))
    if not operands.heads[0]:
        return without_heads(operands)
    if operands.sinks is not None:  # once, of the results for all keys
        without = dataclasses.replace(operands, sinks=None)
        out, lse = _of_one_device(method, without, masks, segment_ids)
        return with_sinks(out, lse, operands.sinks)
    if isinstance(method, AllToAll):
        return method(operands, masks, segment_ids)
    static = method.implementation, method.layout
    masks = of_this_device(*static, masks, method.config.window, segment_ids, operands.sizes)
    config = dataclasses.replace(method.config, window=(None, None))  # which now is in the masks
    return dataclasses.replace(method, config=config)(operands, masks)
