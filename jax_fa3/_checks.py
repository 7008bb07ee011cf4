"""One value of one argument checked. Errors name the argument, what it was and what it should be."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
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


def int32(name: str, x: Integers, shape: tuple[int, ...], batched: bool) -> Array:
    """x as int32 of this shape, [B, ...]; arguments without a batch axis may leave B out.

    Python's and NumPy's integers count if their values fit; of JAX's arrays, whose values are not
    looked at, only the dtype.
    """
    if isinstance(x, (int, list, tuple, np.ndarray, np.generic)):
        x = np.asarray(x)
        if not x.size and x.dtype == float:  # an empty list
            x = x.astype(np.int32)
        fits = x.dtype.kind in "iu" and bool(((-(2**31) <= x) & (x < 2**31)).all())
    else:
        x = jnp.asarray(x)
        fits = jnp.issubdtype(x.dtype, jnp.integer) and np.can_cast(x.dtype, np.int32)
    if not fits:
        raise wrong(name, f"values of dtype {x.dtype}", "integers that fit int32")
    allowed = [shape] if batched else [shape[1:], shape]
    if x.shape not in allowed:
        raise wrong(name, f"shape {x.shape}", " or ".join(map(str, allowed)))
    return jnp.asarray(x, jnp.int32).reshape(shape)


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
    if isinstance(scale, Array):
        real = jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)
        if scale.shape != () or not real:
            raise wrong("scale", f"an array {scale.dtype}{list(scale.shape)}", "a real scalar")
        return scale
    return static_float("scale", scale)


def soft_cap(cap: Any) -> float | None:
    if cap is None:
        return None
    if isinstance(cap, Array) or static_float("logits_soft_cap", cap) <= 0:
        raise wrong("logits_soft_cap", repr(cap), "a static float > 0")
    return float(cap)
