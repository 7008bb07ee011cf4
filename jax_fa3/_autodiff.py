"""From a checked call to its results, with derivatives: the kernels under a custom_vjp, plain JAX
as it is."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from . import _dispatch, _ffi, _guards, _mask, _sharding, _xla
from ._arguments import Call, Implementation
from ._problem import Config, Masks
from ._varying import vary_together

# What the forward leaves for the backward besides its arguments. With the jax.checkpoint policy
# save_only_these_names(*RESIDUAL_NAMES) the forward kernel runs once, not twice.
RESIDUAL_NAMES = ("jax_fa3_out", "jax_fa3_lse")

# query, key and value; or the one packed array, of whose heads N, K, K are these three: they are one
# dimension, or two, [3, N], of which devices can split the second.
Operands = tuple[Array, ...]
Packed = tuple[int, int] | None  # (N, K), where the operands are packed


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
    static = implementation, config, packed, call.sharding
    out, lse = _attend(*static, operands, call.masks, call.segment_ids, traced)
    if not call.batched:
        out, lse = out[0], lse[0]
    return (out, jnp.swapaxes(lse, -1, -2)) if call.return_residual else out


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


# Jitted as _dispatch.run is: an eager call would otherwise compile its loops anew each time.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _attend(
    implementation: Implementation | None,
    config: Config,
    packed: Packed,
    sharding: Any,
    operands: Operands,
    masks: Masks,
    segment_ids: tuple[Array, Array] | None,
    traced: dict[str, Any],
) -> tuple[Array, ...]:
    def local(operands: Operands, masks: Masks, segment_ids: Any, traced: Any) -> Any:
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
    return call(operands, masks, segment_ids, traced)


def _letters(operands: Operands, masks: Masks) -> tuple[tuple[str, ...], Any, tuple[str, str]]:
    """Which dimensions are batch and heads: of the operands, the masks, and out and lse."""
    batch = operands[0].shape[0]

    def of_mask(x: Array) -> str:
        return ("b" if x.shape[0] == batch else ".") + "." * (x.ndim - 1)

    per_mask = jax.tree.map(of_mask, masks)
    if len(operands) == 3:
        tensors = "b.n.", "b.k.", "b.k."
    elif operands[0].ndim == 5:
        tensors = ("b..n.",)
    else:  # one dimension holds three kinds of heads: no device's part would hold some of each
        return ("b...",), per_mask, ("b...", "b..")
    return tensors, per_mask, ("b.n.", "bn.")


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
    query, key, value = _split(packed, operands)
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
    config: Config, packed: Packed, operands: Operands, masks: Masks
) -> tuple[Array, Array]:
    tensors, heads = _for_kernel(packed, operands)
    return _ffi.fwd(config, *tensors, masks, **heads)


def _forward(
    implementation: Implementation | None,
    config: Config,
    packed: Packed,
    operands: Operands,
    masks: Masks,
) -> tuple[tuple[Array, Array], Any]:
    constants = tuple(map(_guards.not_differentiable, operands))
    results = _primal(implementation, config, packed, constants, masks)
    out, lse = map(checkpoint_name, results, RESIDUAL_NAMES)
    return (out, lse), (operands, masks, out, lse)


def _backward(
    implementation: Implementation | None,
    config: Config,
    packed: Packed,
    residuals: tuple[Operands, Masks, Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Operands, None]:
    operands, masks, out, lse = residuals
    tensors, per_mask, results = _letters(operands, masks)
    letters = tensors, per_mask, *results, *results
    functions = _kernel_backward, _plain_backward
    static = implementation, *functions, (config, packed), letters, tensors
    grads = _dispatch.run(*static, operands, masks, out, lse, *cotangents)
    return grads, None  # masks have no gradient


def _kernel_backward(
    config: Config, packed: Packed, operands: Operands, masks: Masks, *results: Array
) -> Operands:
    """Of out, lse and their cotangents."""
    out, lse, dout, dlse = results
    tensors, heads = _for_kernel(packed, operands)
    grads = _ffi.bwd(config, *tensors, masks, out, lse, dout, dlse, **heads)
    return grads if packed is None else (grads[0].reshape(operands[0].shape),)


def _plain_backward(
    config: Config, packed: Packed, operands: Operands, masks: Masks, *results: Array
) -> Operands:
    out, lse, dout, dlse = results
    dq, *dkv = _xla.backward(config, *_split(packed, operands), masks, lse, dout, dlse, out)
    grads = dq.astype(operands[0].dtype), *dkv
    if packed is not None:
        grads = (jnp.concatenate(grads, axis=2).reshape(operands[0].shape),)
    return vary_together((grads, operands))[0]  # without elements they are constants


_with_vjp = jax.custom_vjp(_primal, nondiff_argnums=(0, 1, 2))
_with_vjp.defvjp(_forward, _backward)


def _for_kernel(
    packed: Packed, operands: Operands
) -> tuple[tuple[Array, Array, Array], dict[str, Any]]:
    """query, key and value, and which of their heads are meant."""
    if packed is None:
        query, key, value = operands
        return (query, key, value), {}
    qkv, (num_heads, num_kv_heads) = _one_dimension_of_heads(packed, operands[0])
    first_head = 0, num_heads, num_heads + num_kv_heads
    return (qkv, qkv, qkv), {"num_heads": (num_heads, num_kv_heads), "first_head": first_head}


def _split(packed: Packed, operands: Operands) -> tuple[Array, Array, Array]:
    """query, key and value."""
    if packed is not None:
        qkv, (num_heads, num_kv_heads) = _one_dimension_of_heads(packed, operands[0])
        operands = tuple(jnp.split(qkv, (num_heads, num_heads + num_kv_heads), axis=2))
    query, key, value = operands
    return query, key, value


def _one_dimension_of_heads(heads: tuple[int, int], qkv: Array) -> tuple[Array, tuple[int, int]]:
    """[B, T, 3, N, H] as [B, T, N + 2K, H], and the (N, K) that are here: a device has its own N."""
    if qkv.ndim == 4:
        return qkv, heads
    batch, length, _, num_heads, head_dim = qkv.shape
    return qkv.reshape(batch, length, 3 * num_heads, head_dim), (num_heads, num_heads)
