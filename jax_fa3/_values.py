"""The values of the options of attention, each checked by itself."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ._checks import array, check_floating, integer, integers, static_float, wrong
from ._integers import clamped
from ._problem import Sizes, Window


def checked_segment_ids(
    query_ids: Any, key_ids: Any, padding_segment_id: Any
) -> tuple[Any, Any, int | None] | None:
    """Both and the id, if it is one more than the negative ones, that is padding; or None."""
    both = "both query_segment_ids and key_value_segment_ids"
    if (query_ids is None) != (key_ids is None):
        absent = "query_segment_ids" if query_ids is None else "key_value_segment_ids"
        raise wrong(absent, None, f"{both}, or neither")
    padding = padding_segment_id
    if padding is not None:
        padding = integer("padding_segment_id", padding)
    if query_ids is None:
        if padding is not None:
            raise wrong("padding_segment_id", f"{padding} without segment ids", f"None, or {both}")
        return None
    return query_ids, key_ids, None if padding is None or padding < 0 else padding


def static_sharding(name: str, x: Any, batched: bool) -> NamedSharding | PartitionSpec | None:
    """x, of an array with a batch axis even where the arguments have none."""
    if not isinstance(x, (NamedSharding, PartitionSpec, type(None))):
        raise wrong(name, repr(x), "a jax.sharding.NamedSharding or PartitionSpec")
    if x is None or batched:
        return x
    if isinstance(x, PartitionSpec):
        return PartitionSpec(None, *x)
    return NamedSharding(x.mesh, PartitionSpec(None, *x.spec))


def score_scale(scale: Any, head_dim: int) -> float | Array:
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(scale, Array):  # one whose value is known is as good as a float
        real = jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)
        if scale.shape != () or not real:
            raise wrong("scale", f"an array {scale.dtype}{list(scale.shape)}", "a real scalar")
        if isinstance(scale, Tracer):
            return scale
    return static_float("scale", scale)


def soft_cap(cap: Any) -> float | None:
    if cap is None:
        return None
    if isinstance(cap, Array) or static_float("logits_soft_cap", cap) < 0:
        raise wrong("logits_soft_cap", repr(cap), "a static float > 0, or 0 or None for none")
    return float(cap) or None


def checkpoint_names(name: Any) -> tuple[str, str] | None:
    """Of out, and of the log-sum-exp."""
    names = name if isinstance(name, (tuple, list)) else (name, name)
    if name is None:
        return None
    if len(names) != 2 or not all(isinstance(x, str) for x in names):
        raise wrong("checkpoint_name", repr(name), "a string, or two: of out and the log-sum-exp")
    return names[0], names[1]


def window_size(size: Any) -> Window | None:
    """(left, right), None where there is no bound; None if there is neither."""
    pair = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
    wanted = "a static int, or two, (left, right)"
    left, right = (None if x is None else integer("local_window_size", x, wanted) for x in pair)
    for side in (left, right):
        if side is not None and side < -1:
            raise wrong("local_window_size", side, "an int >= 0, or -1 or None for no bound")
    left, right = (None if side == -1 else side for side in (left, right))
    return None if (left, right) == (None, None) else (left, right)


def offset_of(
    offset: Any, batch: int, batched: bool
) -> tuple[int | None, Array | np.ndarray | None]:
    """Either a static offset, or one that is known at run time, as integers [1] or [B]."""
    if isinstance(offset, (list, tuple)) or getattr(offset, "ndim", 0):
        return None, integers("query_offset", offset, (batch,), batched)
    if isinstance(offset, Array):
        return None, integers("query_offset", offset, (), True).reshape(1)
    return integer("query_offset", offset), None


def floating_dtype(name: str, x: Any) -> np.dtype:
    try:
        dtype = jnp.dtype(x)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise wrong(name, repr(x), "a floating dtype such as jnp.bfloat16")
    return dtype


def dense(name: str, x: ArrayLike | None, full: tuple[int, ...]) -> Array | None:
    """jax.nn's bias or mask with four axes; full: (B, N, T, S)."""
    if x is None:
        return None
    x = array(name, x)
    if name == "bias":
        check_floating(name, x)
    elif x.dtype != bool:
        raise wrong(name, f"dtype {x.dtype}", "bool; an additive mask is a bias")
    shape = (1,) * (4 - x.ndim) + x.shape
    if x.ndim > 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        batch, _, *rows_and_keys = full
        usual = {(batch, full[3]): "[:, None, None]", (batch, *rows_and_keys): "[:, None]"}
        hint = f", such as {name}{usual[x.shape]}" if x.shape in usual else ""
        raise wrong(name, f"shape {x.shape}", f"one that broadcasts to (B, N, T, S) = {full}{hint}")
    return x.reshape(shape)


MOST_INTERVALS = 4


def several_intervals(sizes: Sizes, batched: bool, arguments: dict[str, Any]) -> Array | None:
    """key_begin and key_end [B, T, M], taken out of the arguments, as Operands.mask has them; None if
    they are one interval a row."""
    batch, length = sizes[:2]
    names = "key_begin", "key_end"
    given = {name: arguments[name] for name in names if arguments.get(name) is not None}
    shapes = [shape_of(x) for x in given.values()]
    one = (1, length)  # of one interval, and the batch axis that may be left out
    if not any(len(x) == 3 or (len(x) == 2 and not batched and x != one) for x in shapes):
        return None
    count = shapes[0][-1]
    for name in names:
        if name not in given:
            raise wrong(name, None, f"{count} for each row, as the other has, or no more than one")
    if not 0 < count <= MOST_INTERVALS:
        raise wrong("key_begin", f"{count} intervals a row", f"1 to {MOST_INTERVALS}")
    both = [integers(name, x, (batch, length, count), batched) for name, x in given.items()]
    for name in names:
        del arguments[name]
    return jnp.concatenate([clamped(x) for x in both], axis=-1)[:, None]


def shape_of(x: Any) -> tuple[int, ...]:
    """() of what has none: lists of tracers, or of unequal ones, which integers() refuses."""
    try:
        return tuple(np.shape(x))
    except (TypeError, ValueError):
        return ()


def per_head(name: str, x: ArrayLike | None, heads: int) -> Array | None:
    """A number for each query head."""
    if x is None:
        return None
    x = array(name, x)
    check_floating(name, x)
    if x.shape != (heads,):
        raise wrong(name, f"shape {x.shape}", f"{(heads,)}, one for each query head")
    return x
