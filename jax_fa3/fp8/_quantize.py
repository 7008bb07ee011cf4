"""16-bit arrays to e4m3 with scales."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from .. import _dispatch, _guards
from .._checks import Integers, array, integers, wrong
from .._integers import clamped
from .._jitted import jitted
from .._problem import E4M3_MAX, Implementation, Implementations
from . import _ffi, _transposed
from ._checks import check_not_quantized, checked_mean, refusal_of_head_dim
from ._ffi import BLOCK, Unquantized, blocks
from ._hadamard import check_head_dim, checked_signs, transform

Quantization = Literal["block", "head", "tensor"]


def quantize(
    x: ArrayLike,
    *,
    lengths: Integers | None = None,
    quantization: Quantization = "block",
    signs: ArrayLike | None = None,
    mean: ArrayLike | None = None,
    transposed: bool = False,
    implementation: Implementations | None = None,
) -> tuple[Array, Array]:
    """x as e4m3 numbers times fp32 scales: scale * quantized is x, rounded.

    Block quantization of FlashAttention-3 (arXiv 2407.08608, section 3.3). A scale is the greatest
    magnitude of what it stands for, divided by 448, the greatest e4m3 number; 1 where all is 0.

    Args:
        x: [B, T, N, H], or [T, N, H]; a floating dtype of 16 bits or more. The kernel takes bfloat16
            and float16, H a multiple of 16 from 64 to 256, and "block".
        lengths: int32 [B]; rows from the length on count as 0, whatever they hold, and become 0.
        quantization: which numbers share a scale: "block", each 128 rows of one head; "head", one
            head of one batch entry; "tensor", all of x.
        signs: [H] of +1 and -1: x is transformed first, as by `hadamard_transform` but without
            rounding in between; None for no transform.
        mean: fp32 [B, N, H], or [N, H], subtracted from each row before all else, such as `token_mean`
            gives. Without key's mean scores change by a constant of the row, query @ mean * scale, which
            the log-sum-exp lacks; value's goes to `quantized_dot_product_attention`, which adds it again.
        transposed: for value: in the form in which the attention's kernel reads it, which spares that
            kernel a pass over it (`quantized_dot_product_attention`'s value_transposed).
        implementation: "fa3", the kernel, "xla", plain JAX, or whichever
            `jax_fa3.dot_product_attention` would choose (None, or a sequence; plain JAX for "head"
            and "tensor").

    Returns:
        quantized: float8_e4m3fn, x's shape, computed in fp32 and rounded to nearest even.
        scales: fp32 [B, ceil(T / 128), N], or without B, whichever numbers share one.
        Where a NaN or an infinity is among the numbers of a scale, it is NaN, and so are they.
        Transposed, quantized is [B, N, H, ceil(T / 128) * 128], or without B, rows innermost in an
        order of the kernel's own.

    It has no derivative, and says so.

    Raises:
        ValueError: shapes, dtypes or names that mean nothing.
        NotImplementedError: "fa3", and the kernel does not take x or this machine has none;
            differentiation.
    """
    whole = array("x", x)
    if whole.ndim not in (3, 4):
        raise wrong("x", f"shape {whole.shape}", "(B, T, N, H), or (T, N, H)")
    check_not_quantized("x", whole)
    check_quantization(quantization)
    asked = _dispatch.checked_implementation(implementation)
    flips = checked_signs(signs, whole.shape[-1])
    if flips is not None:
        check_head_dim("x", whole.shape[-1], ", or signs=None")
    batched = whole.ndim == 4
    center = checked_mean("mean", mean, whole.shape)
    whole, counts = whole if batched else whole[None], None
    center = center if batched or center is None else center[None]
    if lengths is not None:
        counts = clamped(integers("lengths", lengths, whole.shape[:1], batched))
    if quantization == "block":
        chosen = _dispatch.choose(asked, _refusal(whole), stacklevel=2)
    elif asked == "fa3":
        wanted = f"wanted 'block', or {_dispatch.ELSEWHERE}"
        raise NotImplementedError(f"quantization: got {quantization!r}, {wanted}")
    else:
        chosen = "xla"
    if not isinstance(transposed, bool):
        raise wrong("transposed", repr(transposed), "True or False")
    static = chosen, quantization, transposed
    quantized, scales = _quantize(*static, whole, flips, counts, center)
    return (quantized, scales) if batched else (quantized[0], scales[0])


@jitted(static=3)
def _quantize(
    implementation: Implementation | None,
    quantization: Quantization,
    transposed: bool,
    x: Array,
    signs: Array | None,
    lengths: Array | None,
    mean: Array | None,
) -> tuple[Array, Array]:
    x = _guards.quantized(x)
    signs = None if signs is None else _guards.quantized(signs)[None]
    given = Unquantized(x, signs, lengths, mean=None if mean is None else _guards.quantized(mean))
    if quantization == "tensor":
        given = given._replace(top=whole_top(given))
    if quantization != "block":
        return plain(transposed, given, quantization)
    all_letters = zip(given, ("b.n.", "..", "b", "...", "bn."), strict=True)
    letters = tuple(None if x is None else dims for x, dims in all_letters)
    made = "bn.." if transposed else "b.n."
    call = implementation, _ffi.quantize, plain, (transposed,), (letters,), (made, "b.n")
    quantized, scales = _dispatch.run(*call, given)
    return quantized, scales


def plain(
    transposed: bool, given: Unquantized, quantization: Quantization = "block"
) -> tuple[Array, Array]:
    """e4m3 [B, T, N, H], or transposed, and its scales, fp32 [B, blocks of T, N]."""
    batch, length, heads, head_dim = given.x.shape
    count, top = blocks(length), given.top
    x = _prepared(given)
    x = jnp.pad(x, ((0, 0), (0, count * BLOCK - length), (0, 0), (0, 0)))
    x = x.reshape(batch, count, BLOCK, heads, head_dim)
    if quantization == "block":
        top = _top(x, (2, 4))
    elif quantization == "head":
        top = _top(x, (1, 2, 4))[:, None]
    assert top is not None
    scales = jnp.broadcast_to(_scale(top), (batch, count, heads))
    # A conversion to e4m3 makes NaN of what is beyond its range; a NaN stays one.
    x = jnp.clip(x / scales[:, :, None, :, None], -E4M3_MAX, E4M3_MAX)
    x = x.reshape(batch, count * BLOCK, heads, head_dim)[:, :length]
    # The barrier keeps XLA from dropping this conversion and that back, which it may do to be exact.
    x = lax.optimization_barrier(x.astype(jnp.float8_e4m3fn))
    return (_transposed.transposed(x, scales) if transposed else x), scales


def whole_top(given: Unquantized) -> Array:
    """The greatest magnitude of all of x, [1, 1, 1]. To be called on whole arrays, not on a device's
    part of them."""
    return _top(_prepared(given), (0, 1, 2, 3)).reshape(1, 1, 1)


def check_quantization(x: Any) -> None:
    if x not in ("block", "head", "tensor"):
        raise wrong("quantization", repr(x), "'block', 'head' or 'tensor'")


def _prepared(given: Unquantized) -> Array:
    """x in fp32, without its mean, transformed, and 0 from the lengths on."""
    x, signs, lengths = given.x.astype(jnp.float32), given.signs, given.lengths
    if given.mean is not None:
        x = x - given.mean[:, None]
    if lengths is not None:
        inside = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        x = jnp.where(inside[..., None, None], x, 0)
    return x if signs is None else transform(x, signs[:, None, None])


def _top(x: Array, axes: tuple[int, ...]) -> Array:
    """The greatest magnitude, NaN if there is a NaN or an infinity: XLA's max on CPUs may lose a NaN."""
    return jnp.where(jnp.isfinite(x).all(axes), jnp.abs(x).max(axes, initial=0), jnp.nan)


def _scale(top: Array) -> Array:
    """From the greatest magnitude; never 0 or subnormal, so that dividing by it is exact enough."""
    # As the kernel does it, and as XLA would write a division.
    scale = jnp.maximum(top * np.float32(1 / E4M3_MAX), float(np.finfo(np.float32).tiny))
    return jnp.where(jnp.isnan(top), jnp.nan, jnp.where(top == 0, 1, scale))


def _refusal(x: Array) -> str | None:
    """Why the kernel cannot take x."""
    if x.dtype.name not in ("bfloat16", "float16"):
        wanted = f"wanted bfloat16 or float16, or {_dispatch.ELSEWHERE}"
        return f"x: got dtype {x.dtype}, {wanted}"
    return refusal_of_head_dim("x", x.shape[-1])
