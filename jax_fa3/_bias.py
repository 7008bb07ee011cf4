"""A dense bias as the kernels read it, and its gradient as they write it. A dense mask that they
do not take as bits (_mask_bits.py), and that is no interval per row, is one of 0 and -inf.

A bias is added to the scaled scores. The kernels read it where it is, by strides that are 0 where it
is broadcast over batch, heads or rows; its gradient is summed over those, in fp32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ._kernel_sizes import MOST_KEYS_OF_SUM, bwd_tile, drifts
from ._operands import Operands
from ._problem import Config, Sizes

LEAST = -1e37  # what is not above hides its key, as -inf does; the kernels' softmax knows no less
TERMS = "bias", "alibi_slopes", "relative_bias"  # Operands' terms of the scores, with gradients
_VECTOR = 16  # bytes of which a row is a multiple


def refusal(config: Config, sizes: Sizes) -> str | None:
    """Why the kernels take none here."""
    if config.logits_soft_cap is not None:
        return "logits_soft_cap: got one beside a bias, wanted one of the two"
    if config.dropout:
        return "bias: got one beside dropout, wanted one of the two"
    width = max(sizes.head_dim, sizes.head_dim_v)
    if not bwd_tile(width).takes_bias:
        return f"bias: got one beside head dim {width}, wanted none beside more than 128"
    keys = sizes.key_length
    if drifts(keys):
        return f"bias: got {keys} keys, wanted at most {MOST_KEYS_OF_SUM} beside it"
    return None


def refusal_of_terms(config: Config, operands: Operands) -> str | None:
    """Why the kernels do not take the terms of the scores that the operands have."""
    *others, name = [name for name in TERMS if getattr(operands, name) is not None] or [None]
    if name in (None, "bias"):
        return None if name is None else refusal(config, operands.sizes)
    found, sizes = f"{name}: got some beside", operands.sizes
    if config.logits_soft_cap is not None:
        return f"{found} logits_soft_cap, wanted one of the two"
    if others:
        other = "a bias" if others[0] == "bias" else others[0]
        return f"{found} {other}, wanted one of the two: the sum of both is a bias"
    if config.dropout:
        return f"{found} dropout, wanted one of the two"
    width = max(sizes.head_dim, sizes.head_dim_v)
    if not bwd_tile(width).takes_bias:
        return f"{found} head dim {width}, wanted none beside more than 128"
    keys = sizes.key_length
    return f"{found} {keys} keys, wanted at most {MOST_KEYS_OF_SUM}" if drifts(keys) else None


def for_kernels(config: Config, operands: Operands) -> Array | None:
    """The bias, with -inf where there is a mask that hides a key.

    It is a copy if rows are not whole vectors, if the dtype is neither query's nor fp32, if it is
    broadcast over the keys, and if there is a mask. With deterministic gradients also where it is
    broadcast over batch or heads: each adds to a gradient of its own then.
    """
    bias, sizes = operands.bias, operands.sizes
    if operands.mask is not None:
        given = jnp.zeros((), operands.query.dtype) if bias is None else bias
        bias = jnp.where(operands.mask, given, -jnp.inf)
    if bias is None:
        return None
    if bias.dtype not in (operands.query.dtype, jnp.float32):
        bias = bias.astype(jnp.float32)
    if bias.shape[3] != sizes.key_length:
        bias = jnp.broadcast_to(bias, (*bias.shape[:3], sizes.key_length))
    if config.deterministic_backward and operands.bias is not None:
        bias = jnp.broadcast_to(bias, (sizes.batch, sizes.num_heads, *bias.shape[2:]))
    step = _VECTOR // bias.dtype.itemsize
    rest = -sizes.key_length % step
    return bias if rest == 0 else jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (0, rest)))


def gradient_of(bias: Array) -> jax.ShapeDtypeStruct:
    """What the kernels write it to, of what they read."""
    return jax.ShapeDtypeStruct(bias.shape, jnp.float32)


def gradient(found: Array, operands: Operands) -> Array:
    """Of operands.bias, by what the kernels wrote."""
    bias = operands.bias
    assert bias is not None
    if 0 in (operands.sizes.batch, operands.sizes.num_heads):
        return jnp.zeros_like(bias)  # nothing was launched
    found = found[..., : operands.sizes.key_length]
    axes = tuple(i for i in range(4) if bias.shape[i] == 1 and found.shape[i] != 1)
    return found.sum(axes, keepdims=True).astype(bias.dtype)


def result_letters(operands: Operands) -> str:
    """Of its gradient, for `_sharding`: with a + for what it is summed over."""
    bias, letters = operands.bias, operands.letters.bias
    assert bias is not None
    sums = "".join(
        "+" if bias.shape[i] == 1 and n != 1 else letters[i]
        for i, n in enumerate((operands.sizes.batch, operands.sizes.num_heads))
    )
    return sums + letters[2:]
