"""The tangents of attention's results, for forward mode, in plain JAX."""

from __future__ import annotations

import jax
from jax import Array

from . import _xla
from ._operands import Operands
from ._problem import Config, Masks
from ._varying import vary_together


def of_results(
    config: Config, operands: Operands, masks: Masks, tangents: Operands
) -> tuple[Array, Array]:
    """The tangents of out [B, T, N, V] and lse [B, N, T], with derivatives of their own.

    Args:
        tangents: like operands, with None for what does not move.
    """
    leaves, tree = jax.tree.flatten(operands)
    along = tree.flatten_up_to(tangents)
    pairs = vary_together([(x, t) for x, t in zip(leaves, along, strict=True) if t is not None])

    def attention(*moved: Array) -> tuple[Array, Array]:
        rest = iter(moved)
        chosen = (x if t is None else next(rest) for x, t in zip(leaves, along, strict=True))
        return _xla.attention(config, jax.tree.unflatten(tree, chosen), masks)

    primals, directions = zip(*pairs, strict=True)
    _, found = jax.jvp(attention, primals, directions)
    return vary_together((found, operands))[0]  # without elements they are constants
