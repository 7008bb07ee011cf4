"""The public function: arguments checked, then one strategy run inside shard_map."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Unpack, overload

import jax
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from .. import _arguments, _dispatch, _guards, _sharding
from .._arguments import Implementation, Options
from .._autodiff import RESIDUAL_NAMES, without_heads
from .._checks import refuse_dense, static_bool, wrong
from .._jitted import finite_in_debug_mode, jitted
from .._problem import Config, Masks, SegmentIds, Sizes
from .._varying import vary_together
from . import _all_gather, _all_to_all, _ring
from ._checks import axis_size, check_lengths, check_replication
from ._layout import Layout
from ._masks import of_this_device
from ._specs import Specs

Strategy = Literal["ring", "all_gather", "all_to_all"]
Operands = tuple[Array, ...]


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: str,
    strategy: Strategy = "ring",
    zigzag: bool = False,
    return_residual: Literal[False] = False,
    **options: Unpack[Options],
) -> Array: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: str,
    strategy: Strategy = "ring",
    zigzag: bool = False,
    return_residual: Literal[True],
    **options: Unpack[Options],
) -> tuple[Array, Array]: ...


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
        options: the other arguments of jax_fa3.dot_product_attention, bias and mask excepted.
            Positions, lengths, query_offset, key_begin and key_end mean the whole sequence:
            key_begin [B, T] is of this device's rows, but counts keys of all devices. Arrays [B]
            and scalars are the same on all devices along the axis. scale is static.

    Returns:
        out [B, T, N, V] in query's dtype, and with return_residual the log-sum-exp, fp32 [B, T, N];
        of this device's rows, or whole arrays with `sharding`. First derivatives in reverse mode;
        saved for them are query, key, value, out and the log-sum-exp, of this device alone
        ("all_to_all": the exchanged ones as well), by the names jax_fa3.RESIDUAL_NAMES.

    Segment ids of all keys (4 bytes each) are gathered. In another order than `zigzag` says, runs of
    them are torn apart, which gives NaN; other arrays do not show their order. Results for parts of the keys are merged in fp32.

    Raises:
        ValueError: as jax_fa3.dot_product_attention; no such axis; lengths or heads that the axis
            does not divide; `sharding` that does not fit; key or value known to be the same on all
            devices along the axis, and query not.
        NotImplementedError: bias, mask, a traced scale; as jax_fa3.dot_product_attention with "fa3".
    """
    refuse_dense(options, "context parallelism")
    tensors, sizes, batched = _arguments.operands(query, key, value)
    call = _arguments.parse(sizes, batched, **options)
    if isinstance(call.scale, Array):
        wanted = "a static float: multiply query by it and pass scale=1.0"
        raise NotImplementedError(f"scale: got an array, wanted {wanted}")
    if strategy not in _SAVING_PARTS and strategy != "all_to_all":
        raise wrong("strategy", repr(strategy), "'ring', 'all_gather' or 'all_to_all'")
    size = axis_size(axis_name, sharding)
    layout = Layout(axis_name, size, static_bool("zigzag", zigzag))
    refused = _dispatch.refusal(call, tensors[0].dtype)
    implementation = _dispatch.choose(call.implementation, refused, stacklevel=2)
    config = Config(call.scale, call.window, call.logits_soft_cap, call.deterministic_backward)
    static = strategy, implementation, config, layout, call.return_residual
    if sharding is None:
        check_lengths(layout, sizes)
        check_replication(layout, tensors)
        found = _attend(*static, tensors, call.masks, call.segment_ids)
    else:
        assert isinstance(sharding, NamedSharding)  # else refused
        specs = Specs.of(sharding, layout, sizes, batched)
        found = _attend_over(sharding, specs, static, tensors, call.masks, call.segment_ids)
    return call.results(*found)


# Jitted as _dispatch.run is: called eagerly, its steps would otherwise be compiled one by one.
@jitted(static=5)
def _attend(
    strategy: Strategy,
    implementation: Implementation | None,
    config: Config,
    layout: Layout,
    with_lse: bool,
    operands: Operands,
    masks: Masks,
    segment_ids: SegmentIds | None,
) -> tuple[Array, ...]:
    """Of this device's rows: out [B, T, N, V], and lse [B, N, T] if that is wanted."""
    device = lax.axis_index(layout.axis_name)
    operands, masks, segment_ids, _ = vary_together((operands, masks, segment_ids, device))
    if not operands[0].shape[2]:
        found = without_heads(operands[0], operands[2].shape[3])
        return found if with_lse else found[:1]
    if strategy == "all_to_all":
        found = _all_to_all.attend(implementation, config, layout, operands, masks, segment_ids)
        return found if with_lse else found[:1]
    (batch, query_length, _, _), key_length = operands[0].shape, operands[1].shape[1]
    lengths = Sizes(batch, query_length, key_length, 0, 0, 0, 0)
    masks = of_this_device(implementation, layout, masks, config.window, segment_ids, lengths)
    config = dataclasses.replace(config, window=(None, None))  # which now is in the masks
    operands = tuple(map(_guards.reverse_mode_only, operands))
    out, lse = _with_vjp(strategy, implementation, config, layout, operands, masks)
    return (out, lse) if with_lse else (out,)


@jitted(static=3)
def _attend_over(
    sharding: NamedSharding,
    specs: Specs,
    static: tuple[Strategy, Implementation | None, Config, Layout, bool],
    operands: Operands,
    masks: Masks,
    segment_ids: SegmentIds | None,
) -> tuple[Array, ...]:
    """_attend of whole arrays."""

    def local(
        operands: Operands, masks: Masks, segment_ids: SegmentIds | None
    ) -> tuple[Array, ...]:
        return _attend(*static, operands, masks, segment_ids)

    mesh, in_specs = sharding.mesh, specs.arguments(masks, segment_ids)
    arguments = jax.tree.map(
        lambda x, spec: _sharding.reshard(x, mesh, spec), (operands, masks, segment_ids), in_specs
    )
    out_specs = specs.results if static[-1] else specs.results[:1]
    call = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return call(*arguments)


# Their forward and backward are written out, so that what is saved is of one device.
_SAVING_PARTS: Any = {"ring": _ring, "all_gather": _all_gather}


def _primal(
    strategy: Strategy,
    implementation: Implementation | None,
    config: Config,
    layout: Layout,
    operands: Operands,
    masks: Masks,
) -> tuple[Array, Array]:
    module = _SAVING_PARTS[strategy]
    return module.forward(implementation, config, layout, operands, masks)


def _forward(
    strategy: Strategy,
    implementation: Implementation | None,
    config: Config,
    layout: Layout,
    operands: Operands,
    masks: Masks,
) -> tuple[tuple[Array, Array], Any]:
    constants = tuple(map(_guards.not_differentiable, operands))
    results = _primal(strategy, implementation, config, layout, constants, masks)
    out, lse = map(checkpoint_name, results, RESIDUAL_NAMES)
    return (out, lse), (operands, masks, out, finite_in_debug_mode(lse))


def _backward(
    strategy: Strategy,
    implementation: Implementation | None,
    config: Config,
    layout: Layout,
    residuals: tuple[Operands, Masks, Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Operands, None]:
    module = _SAVING_PARTS[strategy]
    grads = module.backward(implementation, config, layout, residuals, cotangents)
    return grads, None  # masks have no gradient


_with_vjp = jax.custom_vjp(_primal, nondiff_argnums=(0, 1, 2, 3))
_with_vjp.defvjp(_forward, _backward)
