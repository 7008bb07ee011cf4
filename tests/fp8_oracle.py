"""For the FP8 tests: quantization in NumPy, and attention of dequantized numbers, exact and rounded."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from cases import Case
from helpers import Results
from jax import Array, lax
from jax.typing import DTypeLike

from jax_fa3 import _reference

BLOCK = 128
E4M3 = ml_dtypes.float8_e4m3fn
# FP8 WGMMA takes 32 columns at a time. Their products and the sum so far are aligned to the largest
# exponent among them (of a product: the sum of its factors' exponents), cut off after so many bits
# behind its leading one, and added; of the result as many bits are kept (test_gpu_fp8.py).
WGMMA_COLUMNS, WGMMA_BITS = 32, 13


def sylvester(size: int) -> np.ndarray:
    """The Hadamard matrix of this power of two, fp64."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def transformed(x: np.ndarray, signs: Any = None) -> np.ndarray:
    """hadamard_transform in fp64."""
    size = x.shape[-1] & -x.shape[-1]
    runs = (x * (1 if signs is None else np.asarray(signs, float))).reshape(*x.shape[:-1], -1, size)
    return (runs @ sylvester(size) / np.sqrt(size)).reshape(x.shape)


def quantized(x: np.ndarray, lengths: Any = None, quantization: str = "block") -> Any:
    """fp32 or fp64 x [B, T, N, H] as e4m3 and fp32 scales [B, blocks, N], one block at a time."""
    batch, length, heads, _ = x.shape
    x = x.copy()
    for entry, n in zip(x, [length] * batch if lengths is None else lengths, strict=True):
        entry[max(n, 0) :] = 0
    starts = range(0, length, BLOCK)
    scales = np.ones((batch, len(starts), heads), np.float32)
    out = np.empty(x.shape, E4M3)
    for b, i, n in np.ndindex(scales.shape):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        shared = {"block": x[b, rows, n], "head": x[b, :, n], "tensor": x}[quantization]
        top = np.abs(shared).max()
        if top > 0:
            scales[b, i, n] = np.float32(top) / np.float32(448)
        out[b, rows, n] = (x[b, rows, n] / scales[b, i, n]).clip(-448, 448).astype(E4M3)
    return out, scales


def dequantized(x: Any, scales: Any) -> np.ndarray:
    """fp32."""
    by_row = np.repeat(np.asarray(scales), BLOCK, axis=1)[:, : x.shape[1], :, None]
    return np.asarray(x).astype(np.float32) * by_row


def _exponent(x: Array) -> Array:
    """Of fp32 numbers; that of 0 is far below all others."""
    return jnp.where(x == 0, -60, (lax.bitcast_convert_type(x, jnp.int32) >> 23 & 255) - 127)


def _stepwise(weights: Array, value_scale: Array, head_dim: int) -> Array:
    """Weights as the kernel rounds them: from the last block of keys to the first, times 2^8 above a
    maximum that is raised where it is exceeded by more than 2^0.75, and by V's scale in a unit that
    follows the scales where one is more than twice as large or small. A tile of rows starts with
    the last block that one of them sees."""
    if weights.size == 0:
        return weights
    tile = 192 if head_dim <= 128 else 128
    blocks = value_scale.shape[1]
    b, n, t, s = weights.shape
    sizes = [(0, 0)] * 2 + [(0, -t % tile), (0, blocks * BLOCK - s)]
    weights = jnp.pad(weights, sizes).reshape(b, n, -1, tile, blocks, BLOCK)
    seen = (weights > 0).any((1, 3, 5))  # [B, tiles, blocks]
    last = jnp.where(seen, jnp.arange(blocks), -1).max(-1)[:, None]
    exponents = jnp.log2(value_scale).swapaxes(1, 2).repeat(n // value_scale.shape[2], 1)

    def step(carry: Any, block: Any) -> Any:
        unit, top = carry
        index, exponent, of_block = block
        exponent = exponent[..., None] - unit
        changes = (abs(exponent) > 1 + 1e-4) & (index <= last)  # log2 may be inexact
        unit = unit + jnp.where(changes, exponent, 0)
        exponent = jnp.where(changes, 0, exponent)[..., None]  # [B, N, tiles, 1]
        largest = jnp.log2(of_block.max(-1)) + exponent
        top = jnp.where(largest > top + 0.75, largest, top)
        factor = jnp.exp2(exponent - jnp.maximum(top, -100) + 8)[..., None]  # finite
        return (unit, top), _reference.rounded(of_block * factor, jnp.float8_e4m3fn) / factor

    start = jnp.zeros(weights.shape[:3]), jnp.full(weights.shape[:4], -1e30)
    steps = jnp.arange(blocks), jnp.moveaxis(exponents, 2, 0), jnp.moveaxis(weights, 4, 0)
    result = jnp.moveaxis(lax.scan(step, start, steps, reverse=True)[1], 0, 4)
    return result.reshape(b, n, -1, blocks * BLOCK)[:, :, :t, :s]


def rounding(dtype: DTypeLike, value_scale: Any = None, head_dim: int = 0) -> _reference.Rounding:
    """What the kernel rounds: the scores' sums, the weights to e4m3, and out.

    value_scale: [B, blocks, K]; without it, weights are rounded times 2^8.
    """

    def products(query: Array, key: Array) -> Array:
        query, key = jnp.moveaxis(query, 1, 2)[:, :, :, None], jnp.moveaxis(key, 1, 2)[:, :, None]
        total = jnp.zeros((*query.shape[:3], key.shape[3]))
        for i in range(0, query.shape[-1], WGMMA_COLUMNS):
            columns = slice(i, i + WGMMA_COLUMNS)
            q, k = query[..., columns], key[..., columns]
            exponents = (_exponent(q) + _exponent(k)).max(-1)
            unit = 2.0 ** (jnp.maximum(exponents, _exponent(total)) - WGMMA_BITS)
            terms = jnp.trunc(q * k / unit[..., None]).sum(-1)
            kept = lax.bitcast_convert_type((terms + jnp.trunc(total / unit)) * unit, jnp.int32)
            total = lax.bitcast_convert_type(kept & (-1 << (23 - WGMMA_BITS)), jnp.float32)
        return total

    def probabilities(weights: Array, total: Array) -> Array:
        if value_scale is None:
            return _reference.rounded(weights * 2**8, jnp.float8_e4m3fn) / 2**8 / total
        return _stepwise(weights, jnp.asarray(value_scale), head_dim) / total

    return _reference.Rounding(
        lambda scores: scores, probabilities, lambda x: _reference.rounded(x, dtype), products
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def oracle(case: Case, inputs: Any, dtype: Any = None, value_scale: Any = None) -> Results:
    """Of fp32 query, key and value: exact, or rounded as the kernel does for results in dtype."""
    round_to = None if dtype is None else rounding(dtype, value_scale, case.H)
    with jax.default_matmul_precision("highest"):
        return Results(*_reference.attention(*inputs, **case.arguments, round_to=round_to))


def all_dequantized(tensors: Any, scales: Any) -> list[Array]:
    return [jnp.asarray(dequantized(*pair)) for pair in zip(tensors, scales, strict=True)]


def scaled(case: Case, seed: int = 0) -> tuple[Any, Any]:
    """e4m3 query, key and value of a case, NaN planted past the lengths if it says so, and scales
    that differ from block to block. They are powers of two: then a sum is cut off at the same bit
    whether its terms were scaled or not."""
    rng = np.random.default_rng(seed)
    plain = dataclasses.replace(case, planted=False)
    pairs = [quantized(np.asarray(x)) for x in plain.inputs(jnp.float32, seed)]
    tensors, scales = map(list, zip(*pairs, strict=True))
    scales = [2 ** np.round(np.log2(s) + rng.uniform(-2, 1, s.shape)) for s in scales]
    if case.planted:
        names = "query_seq_lengths", *["key_value_seq_lengths"] * 2
        for x, name in zip(tensors, names, strict=True):
            for entry, length in zip(x, case.mask.get(name, ()), strict=False):
                entry[max(length, 0) :] = np.nan
    return [jnp.asarray(x) for x in tensors], [jnp.asarray(s, jnp.float32) for s in scales]
