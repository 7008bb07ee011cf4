"""Several batch axes, [*B, T, N, H], as one: by reshapes, which copy nothing, on each device.

Each may be split over devices by itself, so explicit axes, and those of the argument `sharding`, are
seen to first (_sharding/_named.py): what is merged are a device's own batch entries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from . import _arguments, _dropout
from ._autodiff import attend
from ._checks import array, known_integers, wrong
from ._integers import INT32_MAX, INT32_MIN, clamped
from ._operands import Call, Operands
from ._sharding._named import over_named_axes
from ._values import shape_of, static_sharding

# Of tensors with one batch axis or none: _tensors.separate, or packed.
Make = Callable[..., tuple[Operands, bool]]

_BOUNDS = "query_seq_lengths", "key_value_seq_lengths", "key_begin", "key_end"
# Integers of each batch entry.
_OF_ENTRIES = *_BOUNDS, "query_offset", "query_segment_ids", "key_value_segment_ids"
_OF_HEADS = {"sinks": "", "alibi_slopes": "", "relative_bias": "."}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the axes, as _sharding has letters


def attention(make: Make, tensors: Mapping[str, Any], behind: int, **options: Any) -> Any:
    """Attention of tensors with any number of batch axes. To be called by the public functions alone: it
    warns in the name of their caller.

    Args:
        tensors: by their names; behind: the dimensions of the first behind its batch axes.
        options: the others of `dot_product_attention`.
    """
    batch = _several(tensors, behind)
    if not batch:
        return attend(parse(make, tensors, behind, **options), stacklevel=4)
    sharding = static_sharding("sharding", options.pop("sharding", None), True)
    arrays = {name: array(name, x) for name, x in tensors.items()}
    # A scale that is known stays static.
    scale = ("scale",) if isinstance(options.get("scale"), Tracer) else ()
    for name in (*_OF_ENTRIES, *_OF_HEADS, "bias", "mask", *scale):
        x = options.get(name)
        if x is not None and not isinstance(x, (int, float)):
            x = _as_array(name, x)
            if isinstance(x, Array):
                arrays[name] = x
            elif x.dtype != object and not np.issubdtype(x.dtype, np.integer):
                pass  # parse refuses it
            elif name in _BOUNDS:
                arrays[name] = clamped(x)
            elif x.size == 0 or (x.min() >= INT32_MIN and x.max() <= INT32_MAX):
                arrays[name] = jnp.asarray(x.astype(np.int32))  # others stay where they are, known

    def call_of(*own: Any) -> Call:
        here = dict(zip(arrays, own, strict=True))
        first = {name: here.pop(name) for name in tensors}
        return parse(make, first, behind, **options | here)

    # Of shapes alone: for what is wrong, and what the results are like.
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays.values())
    call = jax.eval_shape(call_of, *shapes)
    axes = _LETTERS[: len(batch)]
    letters = [_letters(name, x, axes, call.operands) for name, x in arrays.items()]
    operands, words = [*arrays.values()], None
    # Dropout is the same however the call is split: its words are not of a device's own entries.
    if call.dropout is not None:
        _, words = _dropout.checked(options["dropout_rate"], options["dropout_key"])
        of_heads = _dropout.with_words(call.operands, words).dropout
        assert of_heads is not None
        operands.append(of_heads.reshape(*batch, *of_heads.shape[1:]))
        letters.append(f"{axes}{call.operands.result_letters[1][1]}.")

    def local(*own: Array) -> tuple[Array, ...]:
        call = call_of(*own[: len(arrays)])
        if words is not None:
            of_heads = own[-1].reshape(-1, *own[-1].shape[-2:])
            changed = dataclasses.replace(call.operands, dropout=of_heads)
            call = dataclasses.replace(call, operands=changed, dropout=None)
        found = attend(call, stacklevel=6)
        found = found if call.return_residual else (found,)
        return tuple(x.reshape(*own[0].shape[: len(batch)], *x.shape[1:]) for x in found)

    out = call.operands.result_letters[0].replace("b", axes)
    results = (out, out[:-1]) if call.return_residual else (out,)
    found = over_named_axes(local, letters, results, sharding)(*operands)
    return found if call.return_residual else found[0]


def parse(make: Make, tensors: Mapping[str, Any], behind: int, **options: Any) -> Call:
    """The call, checked, with one batch axis in place of several."""
    batch = _several(tensors, behind)
    if batch:
        tensors = {name: _merged(name, x, batch, tensors) for name, x in tensors.items()}
        names = (*_OF_ENTRIES, "bias", "mask")
        options |= {
            name: _merged(name, options[name], batch, tensors)
            for name in names
            if options.get(name) is not None
        }
    return _arguments.parse(*make(*tensors.values()), **options)


def _several(tensors: Mapping[str, Any], behind: int) -> tuple[int, ...]:
    """The sizes of the batch axes, if there are more than one."""
    shape = shape_of(next(iter(tensors.values())))
    return shape[: len(shape) - behind] if len(shape) > behind + 1 else ()


def _as_array(name: str, x: Any) -> Any:
    """Of JAX or NumPy."""
    known = known_integers(x) if name in _OF_ENTRIES else None
    return array(name, x) if known is None else known


def _merged(name: str, given: Any, batch: tuple[int, ...], tensors: Mapping[str, Any]) -> Any:
    """An argument with one batch axis, or 1, in place of these."""
    x, count = _as_array(name, given), len(batch)
    if name == "query_offset" and not x.ndim:
        return given
    if name not in ("bias", "mask"):
        if x.shape[:count] != batch:
            first = next(iter(tensors))
            raise wrong(name, f"shape {x.shape}", f"the batch axes {batch} of {first} in front")
        return x.reshape(math.prod(batch), *x.shape[count:])
    x = x.reshape((1,) * (count + 3 - x.ndim) + x.shape)
    lead, rest = x.shape[:count], x.shape[count:]
    if len(rest) > 3 or any(n not in (1, m) for n, m in zip(lead, batch, strict=True)):
        raise wrong(name, f"shape {given.shape}", f"one that broadcasts to (*{batch}, N, T, S)")
    if math.prod(lead) != 1:
        x = jnp.broadcast_to(x, (*batch, *rest))  # of some axes and not of others: a copy
    return (
        x.reshape(-1, *rest) if 0 not in x.shape else x.reshape(math.prod(x.shape[:count]), *rest)
    )


def _letters(name: str, x: Any, axes: str, operands: Operands) -> str:
    """Of an argument's dimensions, as _sharding has them."""
    heads = operands.result_letters[1][1]
    if name in _OF_HEADS:
        return heads + _OF_HEADS[name]
    if name in ("bias", "mask"):
        dims = f"{axes}{heads}.."[-x.ndim :] if x.ndim else ""
        return "".join("." if n == 1 else letter for n, letter in zip(x.shape, dims, strict=True))
    if name in _OF_ENTRIES:
        return axes[: x.ndim] + "." * (x.ndim - len(axes))
    of_tensor = {"qkv": operands.letters.query} if operands.packed else {}
    letters = of_tensor.get(name) or getattr(operands.letters, name)
    return letters.replace("b", axes)
