"""One value of one argument checked. Errors name the argument, what it was and what it should be."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ._problem import Window

Integers = ArrayLike | Sequence[int]


def wrong(name: str, found: object, wanted: object) -> ValueError:
    return ValueError(f"{name}: got {found}, wanted {wanted}")


def refuse_dense(options: Mapping[str, Any], who: str) -> None:
    """Raises NotImplementedError for bias and mask, which jax_fa3.dot_product_attention alone takes."""
    for name in ("bias", "mask"):
        if options.get(name) is not None:
            raise NotImplementedError(
                f"{name}: got a dense array, wanted None: {who} has masks that are an interval of "
                "keys per row, such as is_causal, segment ids, key_begin and key_end"
            )


def check_names(arguments: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for a keyword argument that the public functions do not have."""
    unknown = set(arguments).difference(known)
    if unknown:
        raise TypeError(f"jax_fa3: got an unexpected keyword argument {min(unknown)!r}")


def static_bool(name: str, x: Any) -> bool:
    if not isinstance(x, (bool, np.bool_)):
        raise wrong(name, repr(x), "True or False, a static bool")
    return bool(x)


def integer(name: str, x: Any) -> int:
    """x as a Python int of any size, if it is static."""
    try:
        if not isinstance(x, (bool, np.bool_, Array)):
            return operator.index(x)
    except TypeError:
        pass
    raise wrong(name, repr(x), "a static int")


def natural(name: str, x: Any) -> int:
    if integer(name, x) < 0:
        raise wrong(name, x, "an int >= 0")
    return integer(name, x)


def array(name: str, x: Any, dtype: Any = None) -> Array:
    """x as a JAX array; of what is none, such as None, strings and dicts, JAX's errors do not say
    which argument it was."""
    if isinstance(x, Array):
        return jnp.asarray(x, dtype)
    try:
        # JAX takes None for NaN, or did, and before 0.11 looks a string up as the name of a dtype.
        if x is not None and not any(isinstance(leaf, str) for leaf in jax.tree.leaves(x)):
            return jnp.asarray(x, dtype)
    except jax.errors.JAXTypeError:  # of tracers in a list
        raise
    except (TypeError, ValueError, OverflowError):
        pass
    raise wrong(name, _what(x), "an array of numbers")


def integers(name: str, x: Integers, shape: tuple[int, ...], batched: bool) -> Array | np.ndarray:
    """x as an array of this shape, [B, ...]; arguments without a batch axis may leave B out.

    Integers of Python and NumPy become NumPy arrays, whose dtype is object where int64 and uint64
    are too narrow; JAX's arrays, whose values are not looked at, stay what they are. _integers
    makes int32 of either.
    """
    found = _known_integers(x)
    found = array(name, x) if found is None else found
    if found.dtype != object and not jnp.issubdtype(found.dtype, jnp.integer):
        raise wrong(name, f"values of dtype {found.dtype}", "integers")
    allowed = [shape] if batched else [shape[1:], shape]
    if found.shape not in allowed:
        raise wrong(name, f"shape {found.shape}", " or ".join(map(str, allowed)))
    return found.reshape(shape)


def _known_integers(x: Any) -> np.ndarray | None:
    """x in NumPy, if it is of Python or NumPy."""
    if not isinstance(x, (int, list, tuple, np.ndarray, np.generic)):
        return None
    try:
        found = np.asarray(x)
        if found.dtype == object or (found.dtype == float and isinstance(x, (list, tuple))):
            # An empty list; integers that int64 or uint64 cannot hold together.
            exact = np.asarray(x, object)
            kinds = {type(element) for element in exact.flat}
            if all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds):
                return exact
            return None if found.dtype == object else found
    except (TypeError, ValueError):  # a list of tracers, or of rows of unequal lengths
        return None
    return found


def _what(x: Any) -> str:
    """Of something that is no array."""
    if x is None or isinstance(x, str):
        return repr(x)
    if isinstance(x, np.ndarray):
        return f"dtype {x.dtype}"
    kind = type(x).__name__
    if isinstance(x, (list, tuple)) and x:
        return f"a {kind} of {', '.join(sorted({type(element).__name__ for element in x}))}"
    return f"a {kind}"


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


def static_float(name: str, x: Any) -> float:
    try:
        number = float(x) if np.ndim(x) == 0 and not isinstance(x, (bool, str)) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise wrong(name, repr(x), "a finite real number")
    return number


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
    left, right = (None if x is None else integer("local_window_size", x) for x in pair)
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


def check_floating(name: str, x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise wrong(name, f"dtype {x.dtype}", "a floating dtype such as bfloat16")


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
        raise wrong(name, f"shape {x.shape}", f"one that broadcasts to (B, N, T, S) = {full}")
    return x.reshape(shape)
