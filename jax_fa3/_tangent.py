"""The tangents of attention's results, for forward mode: by the kernel, or in plain JAX."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import _bias, _dense_mask, _dispatch, _ffi, _xla
from ._custom_call import attributes_of, custom_call
from ._kernel_sizes import JVP_HEAD_DIMS, drifts
from ._operands import Operands, Rows, batch_letters
from ._problem import Config, Implementation, Masks
from ._targets import JVP
from ._varying import vary_together


def of_results(
    implementation: Implementation | None,
    config: Config,
    operands: Operands,
    masks: Masks,
    rows: Rows,
    tangents: Operands,
) -> tuple[Array, ...]:
    """The tangents of out [B, T, N, V] and lse [B, N, T]. What the kernel does not take is left to plain
    JAX, whatever the implementation.

    Args:
        rows: the forward's results.
        tangents: like operands, with None for what does not move.
    """
    tree = jax.tree.structure(operands)
    pairs = zip(*map(tree.flatten_up_to, (operands.letters, tangents)), strict=True)
    moving = jax.tree.unflatten(tree, [x if t is not None else None for x, t in pairs])
    per_mask = batch_letters(masks, operands.sizes.batch)
    letters = operands.letters, per_mask, rows.letters(operands), moving
    function: Any = _kernel if _has_kernel(operands) else plain
    if operands.mask is not None:
        dense = _dense_mask.takes_bits(operands) or _dense_mask.takes_bias(config, operands)
        # Rows that are NaN in the forward of "fa3", which does not fall back, are NaN here.
        if implementation == "fa3" and not dense:
            function = _dense_mask.by_intervals(function, None, False)
        elif function is _kernel:
            function = _dense_mask.by_intervals(_kernel, plain, False)
    static = implementation, function, plain, (config,), letters, operands.result_letters
    return _dispatch.run(*static, operands, masks, rows, tangents)


def _has_kernel(operands: Operands) -> bool:
    """Whether this install has one for them, but for a dense mask."""
    sizes, dtype = operands.sizes, operands.query.dtype
    others = (getattr(operands, name) for name in ("dropout", *_bias.TERMS))
    if any(x is not None for x in others) or drifts(sizes.key_length):
        return False
    widest = max(sizes.head_dim, sizes.head_dim_v)
    built = (h for name, h, v in _ffi.kernels() if name == dtype.name and h == v)
    return any(widest <= h for h in built if h in JVP_HEAD_DIMS)


def custom_call_of(
    config: Config, operands: Operands, masks: Masks, rows: Rows, tangents: Operands
) -> tuple[Array, Array]:
    """The custom call; it does not look at the tangent of sinks."""
    arrays, first_heads, first_column = operands.located()
    given = {name: getattr(operands, name) for name in arrays}
    moved = {
        name: jnp.zeros_like(x) if getattr(tangents, name) is None else getattr(tangents, name)
        for name, x in given.items()
        if x is not None
    }
    along = dataclasses.replace(operands, **moved).located().arrays
    sizes, row = operands.sizes, jax.ShapeDtypeStruct(rows.lse.shape, jnp.float32)
    out = (*sizes[:2], sizes.num_heads, sizes.head_dim_v)
    found = custom_call(
        JVP,
        {
            "out_dot": jax.ShapeDtypeStruct(out, operands.query.dtype),
            "lse_dot": row,
            "tile_counter": jax.ShapeDtypeStruct((1,), jnp.int32),
        },
        attributes_of(config, operands.heads, first_heads, sizes.head_dim_v, first_column),
        **arrays,
        **masks._asdict(),
        **{f"{name}_dot": x for name, x in along.items()},
        out=rows.out,
        lse=rows.lse,
        lse_low=rows.lse_low,
        sinks=operands.sinks,
    )
    return found["out_dot"], found["lse_dot"]


def _kernel(
    config: Config, operands: Operands, masks: Masks, rows: Rows, tangents: Operands
) -> tuple[Array, Array]:
    out_dot, lse_dot = custom_call_of(config, operands, masks, rows, tangents)
    if tangents.sinks is None:
        return out_dot, lse_dot
    assert operands.sinks is not None and rows.out is not None
    weights = jnp.exp(operands.sinks[..., None] - rows.lse)  # of the sinks, in each row
    moved = jnp.where(rows.lse > -jnp.inf, weights, 0) * tangents.sinks[..., None]
    less = jnp.swapaxes(moved, 1, 2)[..., None] * rows.out.astype(moved.dtype)
    return (out_dot.astype(less.dtype) - less).astype(out_dot.dtype), lse_dot + moved


def plain(
    config: Config, operands: Operands, masks: Masks, rows: Rows | None, tangents: Operands
) -> tuple[Array, Array]:
    """The same in plain JAX, from the operands alone; with derivatives of its own."""
    leaves, tree = jax.tree.flatten(operands)
    along = tree.flatten_up_to(tangents)
    moved = [(x, t) for x, t in zip(leaves, along, strict=True) if t is not None]
    # Of an operand that all batch entries share, vmap may make tangents of each entry.
    pairs = vary_together([(jnp.broadcast_to(x, t.shape), t) for x, t in moved])

    def attention(*moved: Array) -> tuple[Array, Array]:
        rest = iter(moved)
        chosen = (x if t is None else next(rest) for x, t in zip(leaves, along, strict=True))
        return _xla.attention(config, jax.tree.unflatten(tree, chosen), masks)

    primals, directions = zip(*pairs, strict=True)
    _, found = jax.jvp(attention, primals, directions)
    return vary_together((found, operands))[0]  # without elements they are constants
