"""Dropout on the attention weights: which of them are dropped, twin of cpp/common/dropout.h.

It is a pure function of the key, the batch entry, the query head, the query row and the key's index,
so forward, backward and every device find the same without an array of it. Philox-2x32 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011) makes

    of two words from the user's key, by (batch entry, head), in seven rounds: two words for each head;
    of those, by (block of 64 keys, pair of query rows i and i + 8), in five: a word and two choices, which
    stand for 128 weights.

That word times a multiplier, which is the pair of keys' j and j + 8 own, plus the head's two words are 64
bits; the XOR of their halves has 7 bits for each of the four weights of that pair of rows and this pair of
keys. A thread of the kernels holds all four, in the forward's accumulators as in the backward's transposed
ones. A weight is dropped if its bits are below a threshold, one of two neighbouring ones, which each row
chooses for each block of keys so that together they have 18 bits of the rate.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._checks import wrong
from ._kernel_sizes import MOST_KEYS_OF_SUM, bwd_tile, drifts
from ._operands import Operands
from ._problem import Sizes

WHOLE = 2**18  # of so many weights Config.dropout are dropped
_HEAD_DIMS = 64, 128  # of the kernels that have it
_ROUNDS, _ROUNDS_OF_BLOCK = 7, 5
_FINER = WHOLE // 2**7  # how finely two thresholds are mixed
_MULTIPLIER = 0xD256D193  # Philox-2x32's
# The multiplier of a pair of keys is the XOR of one of each; digits of pi, odd together.
_OF_QUAD = (0x243F6A88, 0x13198A2E, 0xA4093822, 0x299F31D0)
_OF_PLACE = (
    *(0x85A308D3, 0x03707345, 0xEC4E6C89, 0x082EFA99),
    *(0x38D01377, 0xBE5466CF, 0x452821E7, 0x34E90C6D),
)


def checked(rate: Any, key: Any) -> tuple[int, Array | None]:
    """Config.dropout, and two words from the key; 0 and None where nothing is dropped."""
    if rate is None:
        if key is not None:
            raise wrong("dropout_key", "a key without dropout_rate", "None, or both")
        return 0, None
    try:
        number = float("nan") if isinstance(rate, (bool, str)) else float(rate)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number < 1:
        raise wrong("dropout_rate", repr(rate), "a static float in [0, 1)")
    words = None if key is None else _words(key)
    if number == 0:
        return 0, None
    if words is None:
        wanted = f"a key of jax.random beside dropout_rate={number}"
        raise wrong("dropout_key", None, wanted)
    threshold = min(round(number * WHOLE), WHOLE - 1)
    return threshold, words if threshold else None


def _words(key: Any) -> Array:
    """uint32 [2], random bits of any key: typed or raw."""
    wanted = "one key of jax.random, typed or raw uint32"
    if isinstance(key, np.ndarray) and key.dtype == np.uint32:
        key = jnp.asarray(key)
    if not isinstance(key, Array):
        raise wrong("dropout_key", repr(key), wanted)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except (TypeError, ValueError):
            raise wrong("dropout_key", f"{key.dtype}{list(key.shape)}", wanted) from None
    if key.shape:
        raise wrong("dropout_key", f"keys of shape {key.shape}", wanted)
    return jax.random.bits(key, (2,), jnp.uint32)


def scale(dropout: int) -> float:
    """What the weights that are left are multiplied by."""
    return WHOLE / (WHOLE - dropout)


def with_words(operands: Operands, words: Array | None) -> Operands:
    """With those of each head, uint32 [B, N, 2], of the whole call's: so each device's part of them is
    what is needed there."""
    if words is None:
        return operands
    batch = jnp.arange(operands.sizes.batch, dtype=jnp.uint32)[:, None]
    heads = jnp.arange(operands.sizes.num_heads, dtype=jnp.uint32)
    found = jnp.stack(_philox(words[0], words[1], batch, heads, _ROUNDS), axis=-1)
    return dataclasses.replace(operands, dropout=found)


def kept(words: Array, dropout: int, rows: Array, key_length: int) -> Array:
    """bool [..., R, S]: the weights that are not dropped.

    Args:
        words: uint32 [..., 2], of heads.
        dropout: Config's.
        rows: int [R], which query rows; key_length: S.
    """
    rows = rows.astype(jnp.uint32)[:, None]
    keys = jnp.arange(key_length, dtype=jnp.uint32)
    blocks = jnp.arange((key_length + 63) // 64, dtype=jnp.uint32)
    pairs = (rows >> 4) * 8 + (rows & 7)
    first, second = words[..., 0, None, None], words[..., 1, None, None]
    states = _philox(first, second, blocks, pairs, _ROUNDS_OF_BLOCK)
    left, right = (jnp.repeat(x, 64, axis=-1)[..., :key_length] for x in states)

    place = (keys >> 4 & 3) * 2 + (keys & 1)
    multiplier = _chosen(_OF_QUAD, keys >> 1 & 3) ^ _chosen(_OF_PLACE, place)
    high, low = _product(left, multiplier)
    sum_low = low + first
    bits = (high + second + (sum_low < low)) ^ sum_low
    bits = jnp.where(rows & 8, bits >> 16, bits)
    bits = jnp.where(keys & 8, bits >> 8, bits) & 0x7F
    choice = jnp.where(rows & 8, right >> 16, right) & 0x7FFF
    return bits >= threshold(dropout, choice)


def threshold(dropout: int, choice: Any) -> Any:
    """Of 7 bits, by 15 others, which take one of two: on average dropout / WHOLE of 2^7."""
    return dropout // _FINER + (choice < dropout % _FINER * (2**15 // _FINER))


def _chosen(table: tuple[int, ...], index: Array) -> Array:
    """Without an array of the table: custom_partitioning takes no function that has constants."""
    found = jnp.zeros_like(index)
    for i, x in enumerate(table):
        found = jnp.where(index == i, jnp.uint32(x), found)
    return found


def _philox(
    key: Array, other_key: Array, left: Array, right: Array, rounds: int
) -> tuple[Array, Array]:
    """Both words are keys, in turn."""
    for i in range(rounds):
        high, low = _product(left, jnp.uint32(_MULTIPLIER))
        left, right = high ^ (other_key if i % 2 else key) ^ right, low
    return left, right


def _product(x: Array, y: Array) -> tuple[Array, Array]:
    """The upper and the lower 32 bits of the products of uint32."""
    (a, b), (c, d) = ((z >> 16, z & 0xFFFF) for z in (x, y))
    middle = (b * d >> 16) + (b * c & 0xFFFF) + a * d
    return a * c + (b * c >> 16) + (middle >> 16), x * y


def refusal(sizes: Sizes) -> str | None:
    """Why the kernels have none here."""
    width = max(sizes.head_dim, sizes.head_dim_v)
    if bwd_tile(width).head_dim not in _HEAD_DIMS:
        wanted = "wanted up to 64, or 97 to 128, beside it"
        return f"dropout_rate: got one beside head dim {width}, {wanted}"
    keys = sizes.key_length
    if drifts(keys):
        return f"dropout_rate: got {keys} keys, wanted at most {MOST_KEYS_OF_SUM} beside it"
    return None
