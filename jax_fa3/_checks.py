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
from jax.typing import ArrayLike

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


def integer(name: str, x: Any, wanted: str = "a static int") -> int:
    """x as a Python int of any size, if it is static."""
    try:
        if not isinstance(x, (bool, np.bool_, Array)):
            return operator.index(x)
    except TypeError:
        pass
    if isinstance(x, (Array, np.ndarray)) and x.size > 1:
        raise wrong(name, f"shape {x.shape}", wanted)
    raise wrong(name, repr(x), wanted)


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
    found = known_integers(x)
    found = array(name, x) if found is None else found
    if found.dtype != object and not jnp.issubdtype(found.dtype, jnp.integer):
        raise wrong(name, f"values of dtype {found.dtype}", "integers")
    allowed = [shape] if batched else [shape[1:], shape]
    if found.shape not in allowed:
        raise wrong(name, f"shape {found.shape}", " or ".join(map(str, allowed)))
    return found.reshape(shape)


def known_integers(x: Any) -> np.ndarray | None:
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


def static_float(name: str, x: Any) -> float:
    try:
        number = float(x) if np.ndim(x) == 0 and not isinstance(x, (bool, str)) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise wrong(name, repr(x), "a finite real number")
    return number


def check_floating(name: str, x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise wrong(name, f"dtype {x.dtype}", "a floating dtype such as bfloat16")
