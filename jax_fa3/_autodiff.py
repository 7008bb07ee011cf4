"""From a checked call to its results, with derivatives: the kernels under a custom_vjp, plain JAX
as it is."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from . import _dispatch, _guards, _mask, _sharding, _xla
from ._arguments import Call, Implementation
from ._ffi import vary_together
from ._problem import Config, Masks

# What the forward leaves for the backward besides its arguments. With the jax.checkpoint policy
# save_only_these_names(*RESIDUAL_NAMES) the forward kernel runs once, not twice.
RESIDUAL_NAMES = ("jax_fa3_out", "jax_fa3_lse")

# query, key and value; or the one packed array, of whose heads N, K, K are these three.
Operands = tuple[Array, ...]
Packed = tuple[int, int] | None  # (N, K), where the operands are packed


def attend(call: Call, operands: Operands) -> Array | tuple[Array, Array]:
    """The results that the user asked for. To be called by the public functions only: it warns in
    the name of their caller."""
    sizes = call.sizes
    packed = (sizes.num_heads, sizes.num_kv_heads) if len(operands) == 1 else None
    refused = _dispatch.refusal(call, operands[0].dtype, packed=packed is not None)
    implementation = _dispatch.choose(call.implementation, refused, stacklevel=3)
    masks = call.masks
    if call.segment_ids is not None:
        masks = _mask.with_segments(masks, call.segment_ids, implementation)
    if implementation == "xla":
        options = {"logits_soft_cap": call.logits_soft_cap, "bias": call.bias, "mask": call.mask}
        out, lse = _plain(call.window, packed, operands, masks, call.scale, **options)
    else:
        assert isinstance(call.scale, float)  # else refused
        config = Config(call.scale, call.window, call.logits_soft_cap, call.deterministic_backward)
        out, lse = differentiable(implementation, config, packed, operands, masks)
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
@functools.partial(
    jax.jit, static_argnums=(0, 1), static_argnames=("logits_soft_cap", "partial"), inline=True
)
def _plain(
    window: Any, packed: Packed, operands: Operands, masks: Masks, scale: Any, **options: Any
) -> tuple[Array, Array]:
    query, key, value = _split(packed, operands)
    return _xla.attention(query, key, value, masks, window, scale=scale, **options)


def _primal(
    implementation: Implementation | None,
    config: Config,
    packed: Packed,
    operands: Operands,
    masks: Masks,
) -> tuple[Array, Array]:
    """out [B, T, N, V] and lse [B, N, T] of the kernels, or of plain JAX on other platforms."""
    return _dispatch.run(implementation, _kernel, _portable, (config, packed), operands, masks)


def _kernel(
    config: Config, packed: Packed, operands: Operands, masks: Masks
) -> tuple[Array, Array]:
    if packed is None:
        query, key, value = operands
        return _sharding.fwd(config, None, (0, 0, 0), query, key, value, masks)
    (qkv,), (num_heads, num_kv_heads) = operands, packed
    first_head = 0, num_heads, num_heads + num_kv_heads
    return _sharding.fwd(config, packed, first_head, qkv, qkv, qkv, masks)


def _portable(
    config: Config, packed: Packed, operands: Operands, masks: Masks
) -> tuple[Array, Array]:
    options = {"logits_soft_cap": config.logits_soft_cap, "partial": config.partial}
    return _plain(config.window, packed, operands, masks, config.scale, **options)


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


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _backward(
    implementation: Implementation | None,
    config: Config,
    packed: Packed,
    residuals: tuple[Operands, Masks, Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Operands, None]:
    operands, masks, out, lse = residuals
    grads = _xla.backward(config, *_split(packed, operands), masks, lse, *cotangents, out)
    if packed is not None:
        grads = (jnp.concatenate(grads, axis=2),)
    grads, _ = vary_together((grads, operands))  # without elements they are constants
    return grads, None  # masks have no gradient


_with_vjp = jax.custom_vjp(_primal, nondiff_argnums=(0, 1, 2))
_with_vjp.defvjp(_forward, _backward)


def _split(packed: Packed, operands: Operands) -> tuple[Array, Array, Array]:
    """query, key and value."""
    if packed is not None:
        num_heads, num_kv_heads = packed
        operands = tuple(jnp.split(operands[0], (num_heads, num_heads + num_kv_heads), axis=2))
    query, key, value = operands
    return query, key, value
