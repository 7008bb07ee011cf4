"""From a checked call to its results, with derivatives: the kernels under a custom_vjp, plain JAX
as it is."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from . import _dispatch, _ffi, _guards, _mask, _sharding, _xla
from ._arguments import Call, Implementation
from ._jitted import finite_in_debug_mode, jitted
from ._packed import Operands, Packed, for_kernel, split
from ._problem import Config, Masks, SegmentIds, wide
from ._varying import vary_together

# What the forward leaves for the backward besides its arguments. With the jax.checkpoint policy
# save_only_these_names(*RESIDUAL_NAMES) the forward kernel runs once, not twice.
RESIDUAL_NAMES = ("jax_fa3_out", "jax_fa3_lse", "jax_fa3_lse_low")


def attend(call: Call, operands: Operands) -> Array | tuple[Array, Array]:
    """The results that the user asked for. To be called by the public functions only: it warns in
    the name of their caller."""
    sizes = call.sizes
    packed = (sizes.num_heads, sizes.num_kv_heads) if len(operands) == 1 else None
    refused = _dispatch.refusal(call, operands[0].dtype, packed=packed is not None)
    implementation = _dispatch.choose(call.implementation, refused, stacklevel=3)
    traced, scale = {}, call.scale
    if implementation == "xla":  # which takes more than the kernels do
        traced, scale = {"scale": scale, "bias": call.bias, "mask": call.mask}, 1.0
    assert isinstance(scale, float)  # else refused
    config = Config(scale, call.window, call.logits_soft_cap, call.deterministic_backward)
    static = implementation, config, packed, call.sharding, call.return_residual
    return call.results(*_attend(*static, operands, call.masks, call.segment_ids, traced))


def without_heads(
    query: Array, head_dim_v: int, dtype: np.dtype | None = None
) -> tuple[Array, Array]:
    """out [B, T, 0, V] and lse [B, 0, T] of a query without heads: no gradient reaches anything. Not
    even XLA gets to see the products of nothing, on which its partitioner crashes."""
    rows = lax.stop_gradient(query).astype(wide(query.dtype)).sum(-1)
    out = jnp.broadcast_to(rows[..., None], (*rows.shape, head_dim_v))
    return out.astype(dtype or query.dtype), jnp.swapaxes(rows, 1, 2)


def differentiable(
    implementation: Implementation | None,
    config: Config,
    packed: Packed,
    operands: Operands,
    masks: Masks,
) -> tuple[Array, Array]:
    """out [B, T, N, V] and lse [B, N, T], with first derivatives in reverse mode."""
    operands, masks = vary_together((operands, masks))
    operands = tuple(map(_guards.reverse_mode_only, operands))
    return _with_vjp(implementation, config, packed, operands, masks)


# Jitted as _dispatch.run is: an eager call would otherwise compile its loops anew each time. It has
# no lse that nobody asked for: jax_debug_infs looks at every result.
@jitted(static=5)
def _attend(
    implementation: Implementation | None,
    config: Config,
    packed: Packed,
    sharding: Any,
    with_lse: bool,
    operands: Operands,
    masks: Masks,
    segment_ids: SegmentIds | None,
    traced: dict[str, Any],
) -> tuple[Array, ...]:
    def local(operands: Operands, masks: Masks, segment_ids: Any, traced: Any) -> Any:
        if not (operands[0].shape[2] if packed is None else packed[0]):
            query, _, value = split(packed, operands)
            return without_heads(query, value.shape[3])
        if segment_ids is not None:
            masks = _mask.with_segments(masks, segment_ids, implementation)
        if implementation == "xla":
            return _plain(config, packed, operands, masks, **traced)
        return differentiable(implementation, config, packed, operands, masks)

    tensors, per_mask, results = _letters(operands, masks)
    per_id = None if segment_ids is None else ("b.", "b.")
    per_traced = {name: _dense_letters(x, operands[0], results) for name, x in traced.items()}
    letters = tensors, per_mask, per_id, per_traced
    call = _sharding.over_named_axes(local, letters, results, sharding)
    out, lse = call(operands, masks, segment_ids, traced)
    return (out, lse) if with_lse else (out,)


def _letters(operands: Operands, masks: Masks) -> tuple[tuple[str, ...], Any, tuple[str, str]]:
    """Which dimensions are batch and heads, and query's others: of the operands, the masks, and out and
    lse."""
    batch = operands[0].shape[0]

    def of_mask(x: Array) -> str:
        return ("b" if x.shape[0] == batch else ".") + "." * (x.ndim - 1)

    per_mask = jax.tree.map(of_mask, masks)
    if len(operands) == 3:
        tensors = "btnh", "b.k.", "b.k."
    elif operands[0].ndim == 5:
        tensors = ("bt.nh",)
    else:  # one dimension holds three kinds of heads: no device's part would hold some of each
        return ("bt.h",), per_mask, ("bt.h", "b.t")
    same = operands[0].shape[-1] == operands[-1].shape[-1]
    return tensors, per_mask, ("btnh" if same else "btn.", "bnt")


def _dense_letters(x: Array | None, query: Array, results: tuple[str, str]) -> str | None:
    """Of bias or mask, [B or 1, N or 1, T or 1, S or 1], or of a scale."""
    if x is None or not x.ndim:
        return None if x is None else ""
    heads = results[1][1] if x.shape[1] > 1 else "."
    return ("b" if x.shape[0] == query.shape[0] else ".") + heads + ".."


def _plain(
    config: Config,
    packed: Packed,
    operands: Operands,
    masks: Masks,
    *,
    scale: Array | None = None,
    **dense: Array | None,
) -> tuple[Array, Array]:
    query, key, value = split(packed, operands)
    options: Any = {"logits_soft_cap": config.logits_soft_cap, **dense}
    options |= {"scale": config.scale if scale is None else scale, "partial": config.partial}
    return _xla.attention(query, key, value, masks, config.window, **options)


def _primal(
    implementation: Implementation | None,
    config: Config,
    packed: Packed,
    operands: Operands,
    masks: Masks,
) -> tuple[Array, ...]:
    """out [B, T, N, V] and lse [B, N, T] of the kernels, or of plain JAX on other platforms."""
    *letters, results = _letters(operands, masks)
    static = implementation, _kernel, _plain, (config, packed), tuple(letters), results
    return _dispatch.run(*static, operands, masks)


def _kernel(
    config: Config, packed: Packed, operands: Operands, masks: Masks, *, with_lse_low: bool = False
) -> tuple[Array, ...]:
    tensors, heads = for_kernel(packed, operands)
    return _ffi.fwd(config, *tensors, masks, with_lse_low=with_lse_low, **heads)


_kernel_for_gradient = functools.partial(_kernel, with_lse_low=True)


def _plain_for_gradient(
    config: Config, packed: Packed, operands: Operands, masks: Masks
) -> tuple[Array, ...]:
    """With an lse_low too, which plain JAX does not need: its backward normalizes anew."""
    out, lse = _plain(config, packed, operands, masks)
    return out, lse, jnp.zeros_like(lse)


def _forward(
    implementation: Implementation | None,
    config: Config,
    packed: Packed,
    operands: Operands,
    masks: Masks,
) -> tuple[tuple[Array, Array], Any]:
    constants = tuple(map(_guards.not_differentiable, operands))
    *letters, results = _letters(operands, masks)
    functions = _kernel_for_gradient, _plain_for_gradient
    static = implementation, *functions, (config, packed), tuple(letters), (*results, results[1])
    named = zip(_dispatch.run(*static, constants, masks), RESIDUAL_NAMES, strict=True)
    out, lse, lse_low = (checkpoint_name(x, name) for x, name in named)
    return (out, lse), (operands, masks, out, finite_in_debug_mode(lse), lse_low)


def _backward(
    implementation: Implementation | None,
    config: Config,
    packed: Packed,
    residuals: Any,
    cotangents: tuple[Array, Array],
) -> tuple[Operands, None]:
    operands, masks, out, lse, *low = residuals  # low: lse_low, or nothing
    tensors, per_mask, results = _letters(operands, masks)
    letters = tensors, per_mask, *results, *results, *[results[1]] * len(low)
    functions = _kernel_backward, _plain_backward
    static = implementation, *functions, (config, packed), letters, tensors
    grads = _dispatch.run(*static, operands, masks, out, lse, *cotangents, *low)
    return grads, None  # masks have no gradient


def _kernel_backward(
    config: Config, packed: Packed, operands: Operands, masks: Masks, *results: Array
) -> Operands:
    """Of out, lse, their cotangents and, from the 16-bit forward, lse_low."""
    tensors, heads = for_kernel(packed, operands)
    grads = _ffi.bwd(config, *tensors, masks, _ffi.Rows(*results), **heads)
    return grads if packed is None else (grads[0].reshape(operands[0].shape),)


def _plain_backward(
    config: Config, packed: Packed, operands: Operands, masks: Masks, *results: Array
) -> Operands:
    out, lse, dout, dlse, *_ = results
    dq, *dkv = _xla.backward(config, *split(packed, operands), masks, lse, dout, dlse, out)
    grads = dq.astype(operands[0].dtype), *dkv
    if packed is not None:
        grads = (jnp.concatenate(grads, axis=2).reshape(operands[0].shape),)
    return vary_together((grads, operands))[0]  # without elements they are constants


_with_vjp = jax.custom_vjp(_primal, nondiff_argnums=(0, 1, 2))
_with_vjp.defvjp(_forward, _backward)
