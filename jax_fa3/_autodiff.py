"""From a checked call to its results, with derivatives: functions whose derivative is written out
stand under the one custom_vjp, or with both modes under _forward_mode's custom_jvp; plain JAX as it is."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from . import (
    _bias,
    _dense_mask,
    _dispatch,
    _dropout,
    _ffi,
    _forward_mode,
    _guards,
    _mask,
    _plain,
    _sharding,
    _tangent,
    _xla,
)
from ._forward_mode import RESIDUAL_NAMES, named
from ._jitted import finite_in_debug_mode, jitted
from ._operands import Call, Operands, Rows, batch_letters
from ._problem import Config, Implementation, Masks, wide
from ._varying import vary_together


@dataclasses.dataclass(frozen=True)
class Method:
    """How a call is computed: a function of operands, masks and `more`, which is a pytree of whatever
    else it reads, without a derivative; to out [B, T, N, V] and lse [B, N, T]. Static, so hashable."""

    implementation: Implementation | None  # which _dispatch.choose gave
    config: Config
    dtype: np.dtype | None = dataclasses.field(default=None, kw_only=True)  # of out; None: query's

    def __call__(self, operands: Operands, masks: Masks, more: Any = None) -> tuple[Array, ...]:
        return differentiable(self, operands, masks, more)

    def forward(
        self, operands: Operands, masks: Masks, more: Any, for_gradient: bool
    ) -> tuple[Array, ...]:
        """out and lse; for_gradient, it may add lse_low for its backward."""
        raise NotImplementedError

    def backward(self, operands: Operands, masks: Masks, rows: Rows) -> Operands:
        """The gradient of operands."""
        raise NotImplementedError

    def gradient(self, operands: Operands, masks: Masks, more: Any, rows: Rows) -> Operands:
        """The same, where `more` counts."""
        return self.backward(operands, masks, rows)

    def letters(self, more: Any) -> Any:
        """Of `more`, as `_sharding` has them."""
        return None


def attend(call: Call, *, stacklevel: int) -> Any:
    """The results that the user asked for, of 16-bit kernels or plain JAX; stacklevel: of the public
    function's caller, in whose name it warns."""
    refused = _dispatch.refusal(call)
    implementation = _dispatch.choose(call.implementation, refused, stacklevel=stacklevel)
    if implementation == "xla" and call.operands.scale is None:
        # As an array, so that an eager call with another scale is the same program.
        operands = dataclasses.replace(call.operands, scale=call.config.scale)
        config = dataclasses.replace(call.config, scale=1.0)
        call = dataclasses.replace(call, operands=operands, config=config)
    return compute(Attention(implementation, call.config), call, None)


def on_each_device(method: Method, call: Call, more: Any) -> Any:
    """The results that the user asked for, each device working on its own batch entries and heads. To
    be called inside jit."""

    def local(operands: Operands, more: Any, masks: Masks, segment_ids: Any) -> tuple[Array, ...]:
        if not operands.heads[0]:
            return without_heads(operands, method.dtype)
        if segment_ids is not None:
            masks = _mask.with_segments(masks, segment_ids, method.implementation)
        return method(operands, masks, more)

    masks, segment_ids = call.masks, call.segment_ids
    operands = _dropout.with_words(call.operands, call.dropout)
    per_mask = batch_letters(masks, operands.sizes.batch)
    per_id = None if segment_ids is None else ("b.", "b.")
    letters = operands.letters, method.letters(more), per_mask, per_id
    split = _sharding.over_named_axes(local, letters, operands.result_letters, call.sharding)
    out, lse = split(operands, more, masks, segment_ids)
    return call.finish(out, lse)


# Jitted as _dispatch.run is: an eager call would otherwise compile its loops anew each time.
compute = jitted(static=1)(on_each_device)


def without_heads(operands: Operands, dtype: np.dtype | None = None) -> tuple[Array, Array]:
    """out [B, T, 0, V] and lse [B, 0, T] of a query without heads: no gradient reaches anything. Not
    even XLA gets to see the products of nothing, on which its partitioner crashes."""
    query, _, value = operands.split()
    rows = lax.stop_gradient(query).astype(wide(query.dtype)).sum(-1)
    out = jnp.broadcast_to(rows[..., None], (*rows.shape, value.shape[3]))
    return out.astype(dtype or query.dtype), jnp.swapaxes(rows, 1, 2)


def differentiable(
    method: Method, operands: Operands, masks: Masks, more: Any = None
) -> tuple[Array, Array]:
    """out [B, T, N, V] and lse [B, N, T], with first derivatives in reverse mode."""
    operands, masks, more = vary_together((operands, masks, more))
    operands = jax.tree.map(_guards.reverse_mode_only, operands)
    return _with_vjp(method, operands, masks, more)


def _primal(method: Method, operands: Operands, masks: Masks, more: Any) -> tuple[Array, ...]:
    return method.forward(operands, masks, more, for_gradient=False)


def _forward(
    method: Method, operands: Operands, masks: Masks, more: Any
) -> tuple[tuple[Array, Array], Any]:
    constants = jax.tree.map(_guards.not_differentiable, operands)
    results = method.forward(constants, masks, more, for_gradient=True)
    results = tuple(map(checkpoint_name, results, RESIDUAL_NAMES))
    out, lse, *low = named(method.config, results)
    return (out, lse), (operands, masks, more, out, finite_in_debug_mode(lse), low)


def _backward(
    method: Method, residuals: Any, cotangents: tuple[Array, Array]
) -> tuple[Operands, None, None]:
    operands, masks, more, out, lse, low = residuals
    # Neither masks nor what else there is have a gradient.
    return method.gradient(operands, masks, more, Rows(out, lse, *cotangents, *low)), None, None


_with_vjp = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_with_vjp.defvjp(_forward, _backward)


class Attention(Method):
    """By the 16-bit kernels, or in plain JAX."""

    def __call__(self, operands: Operands, masks: Masks, more: Any = None) -> tuple[Array, ...]:
        if self.implementation == "xla":  # which has every derivative, and takes dense operands
            return named(self.config, _xla.attention(self.config, operands, masks))
        return _forward_mode.differentiable(self, operands, masks)

    def forward(
        self, operands: Operands, masks: Masks, more: Any, for_gradient: bool
    ) -> tuple[Array, ...]:
        letters = operands.letters, batch_letters(masks, operands.sizes.batch)
        functions, results = (_ffi.fwd, _xla.attention), operands.result_letters
        if for_gradient:
            with_gradient(self.implementation, operands)
            functions = _kernel_for_gradient, _plain.for_gradient
            results = *results, results[1]
        if operands.mask is not None:
            functions = _dense_mask.taken(self.implementation, *functions)
        static = self.implementation, *functions, (self.config,), letters, results
        return _dispatch.run(*static, operands, masks)

    def backward(
        self, operands: Operands, masks: Masks, rows: Rows, with_dbias: bool = True
    ) -> Operands:
        implementation = with_gradient(self.implementation, operands)
        method = dataclasses.replace(self, implementation=implementation)
        return backward(method, _plain.backward, operands, masks, rows, with_dbias)

    def tangent(
        self, operands: Operands, masks: Masks, rows: Rows, tangents: Operands
    ) -> tuple[Array, ...]:
        """The tangents of out and lse, by those of operands: None where one does not move."""
        call = self.implementation, self.config, operands, masks, rows, tangents
        return _tangent.of_results(*call)

    def plain_tangent(
        self, operands: Operands, masks: Masks, tangents: Operands
    ) -> tuple[Array, ...]:
        """The same in plain JAX, as a function with derivatives."""
        return _tangent.plain(self.config, operands, masks, None, tangents)


def with_gradient(
    implementation: Implementation | None, operands: Operands
) -> Implementation | None:
    """The implementation of the backward: the widest heads have a kernel for the forward alone."""
    refused = _dispatch.refusal_of_gradient(operands)
    if refused is None or implementation == "xla":
        return implementation
    return _dispatch.choose(implementation, refused)


def backward(
    method: Method,
    plain: Any,
    operands: Operands,
    masks: Masks,
    rows: Rows,
    with_dbias: bool = True,
) -> Operands:
    """The gradient of operands, of terms of the scores with_dbias alone; by the 16-bit kernels or `plain`."""
    kernel = _ffi.bwd
    others = dict.fromkeys((*_bias.TERMS, "mask", "dropout"))
    wanted = dataclasses.replace(operands.letters, **others)
    biased = any(getattr(operands, name) is not None for name in _bias.TERMS)
    if biased and with_dbias:
        if operands.bias is not None:
            wanted = dataclasses.replace(wanted, bias=_bias.result_letters(operands))
        plain = _dense_mask.plain_backward
    elif biased:
        kernel, plain = _kernel_without_dbias, _plain_without_dbias
    elif operands.mask is not None or operands.dropout is not None:
        plain = _dense_mask.plain_backward
    elif operands.sinks is not None:
        plain = _plain.backward_by_rows
    if operands.mask is not None:
        kernel, plain = _dense_mask.taken(method.implementation, kernel, plain)
    of_heads = ("sinks", *_bias.TERMS[1:]) if with_dbias else ("sinks",)
    of_heads = [name for name in of_heads if getattr(operands, name) is not None]
    for name in of_heads:  # of each batch entry
        of_each = operands.result_letters[1][:2] + "." * (getattr(operands, name).ndim - 2)
        wanted = dataclasses.replace(wanted, **{name: of_each})
    per_mask = batch_letters(masks, operands.sizes.batch)
    letters = operands.letters, per_mask, rows.letters(operands)
    results = tuple(jax.tree.leaves(wanted))
    static = method.implementation, kernel, plain, (method.config,), letters, results
    grads = _dispatch.run(*static, operands, masks, rows)
    found: Any = jax.tree.unflatten(jax.tree.structure(wanted), grads)
    for name in of_heads:
        if getattr(operands, name).shape[0] == 1:
            summed = getattr(found, name).sum(0, keepdims=True)
            found = dataclasses.replace(found, **{name: summed})
    return found


_kernel_for_gradient = functools.partial(_ffi.fwd, with_lse_low=True)
_kernel_without_dbias = functools.partial(_ffi.bwd, with_dbias=False)
_plain_without_dbias = functools.partial(_dense_mask.plain_backward, with_dbias=False)
