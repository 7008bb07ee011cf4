"""Incoherent processing: a random orthonormal transform that spreads outliers over the head dim.

Query and key are transformed alike, so their products stay what they were (QuIP, Chee et al., arXiv
2307.13304; FlashAttention-3, arXiv 2407.08608, section 3.3).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .._checks import array, natural, wrong
from .._problem import wide

LEAST_BLOCK = 16


def hadamard_transform(x: ArrayLike, signs: ArrayLike | None = None) -> Array:
    """(x * signs) times an orthonormal Hadamard matrix, along the last axis.

    H = m * p, where p is the greatest power of two that divides H: each run of p numbers is multiplied
    by Sylvester's matrix of that size, entry (i, j) of which is (-1)^popcount(i & j) / sqrt(p).

    Args:
        x: [..., H], any floating dtype; p must be at least 16.
        signs: [H], of +1 and -1; None for all +1. `random_signs` gives them.

    Returns:
        [..., H] in x's dtype, computed in fp32 (fp64 for fp64). Products of two arrays along H do not
        change if both are transformed with the same signs.

    Raises ValueError: x has no such head dim, or is not floating; signs are not [H].
    """
    x = array("x", x)
    if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        raise wrong("x", f"{x.dtype}{list(x.shape)}", "[..., H] of a floating dtype")
    check_head_dim("x", x.shape[-1])
    flips = checked_signs(signs, x.shape[-1])
    if flips is not None:
        flips = flips.reshape(*[1] * (x.ndim - 1), -1)
    return transform(x.astype(wide(x.dtype)), flips).astype(x.dtype)


def random_signs(key: ArrayLike, head_dim: int) -> Array:
    """H signs for `hadamard_transform`.

    Args:
        key: an int >= 0, whose signs are constants of the program and never change; or a key of
            jax.random, whose signs are drawn at run time.
        head_dim: H.

    Returns: fp32 [H], of +1 and -1.

    Raises ValueError: key is neither.
    """
    head_dim = natural("head_dim", head_dim)
    if not isinstance(key, (Array, np.ndarray)):  # natural says what is wrong with others
        bits = np.random.PCG64(natural("key", key)).random_raw(head_dim) >> np.uint64(63)
        return jnp.asarray(1 - 2 * bits.astype(np.float32))
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key.ndim != (0 if typed else 1) or not (typed or key.dtype == jnp.uint32):
        raise wrong("key", f"{key.dtype}{list(key.shape)}", "an int, or one key of jax.random")
    return jax.random.rademacher(key, (head_dim,), jnp.float32)


def transform(x: Array, signs: Array | None) -> Array:
    """hadamard_transform of fp32 or fp64 x; signs: broadcastable to x, of x's or a narrower dtype."""
    x = x if signs is None else x * signs.astype(x.dtype)
    # "highest": on GPUs and TPUs fp32 would be rounded to 11 bits or fewer.
    found = jnp.einsum("...h,hj->...j", x, _matrix(x.shape[-1], x.dtype), precision="highest")
    return found * (1 / math.sqrt(power_of_two(x.shape[-1])))


def undone(x8: Array, signs: Array) -> Array:
    """fp32: what was transformed to e4m3 x8; signs: broadcastable to it."""
    # Exact, for bf16 has all e4m3 numbers, and so fast as tensor cores are.
    x = x8.astype(jnp.bfloat16)
    found = jnp.einsum(
        "...h,hj->...j", x, _matrix(x.shape[-1], x.dtype), preferred_element_type=jnp.float32
    )
    return found * (1 / math.sqrt(power_of_two(x.shape[-1]))) * signs


def _matrix(head_dim: int, dtype: Any) -> Array:
    size = power_of_two(head_dim)
    j = jnp.arange(head_dim, dtype=jnp.int32)[None]
    i = j.T
    parity = jax.lax.population_count(i % size & j % size) % 2
    return jnp.where(i // size == j // size, 1 - 2 * parity, 0).astype(dtype)


def checked_signs(signs: Any, head_dim: int) -> Array | None:
    if signs is None:
        return None
    signs = array("signs", signs)
    if signs.shape != (head_dim,):
        raise wrong("signs", f"shape {signs.shape}", f"({head_dim},), one for each column of x")
    return signs.astype(jnp.float32)


def check_head_dim(name: str, head_dim: int, instead: str = "") -> None:
    if power_of_two(head_dim) < LEAST_BLOCK:
        found = f"head dim {head_dim}, whose greatest power of two is {power_of_two(head_dim)}"
        raise wrong(name, found, f"a multiple of {LEAST_BLOCK} for the Hadamard transform{instead}")


def power_of_two(n: int) -> int:
    """The greatest that divides n; 0 for 0."""
    return n & -n
