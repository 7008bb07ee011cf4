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
from helpers import oracle as exact_oracle
from jax import Array, lax
from jax.typing import DTypeLike

from jax_fa3 import _reference

BLOCK = 128
E4M3 = ml_dtypes.float8_e4m3fn
# FP8 WGMMA takes 32 columns at a time. Their products and the sum so far are aligned to the largest
# exponent among them (of a product: the sum of its factors' exponents), cut off after so many bits
# behind its leading one, and added; of the result as many bits are kept (test_gpu_fp8.py).
WGMMA_COLUMNS, WGMMA_BITS = 32, 13
# Up to this head dim the kernel sums weights as they are rounded.
SUMS_ROUNDED = 128


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


def _stepwise(weights: Array) -> Array:
    """Weights as the kernel rounds them: from the last block of keys to the first, times 2^8 above a
    maximum that is raised where it is exceeded by more than 2^0.75."""
    if weights.size == 0:
        return weights
    b, n, t, s = weights.shape
    blocks = -(-s // BLOCK)
    padded = jnp.pad(weights, [(0, 0)] * 3 + [(0, blocks * BLOCK - s)])
    by_block = jnp.moveaxis(padded.reshape(b, n, t, blocks, BLOCK), 3, 0)

    def step(top: Any, of_block: Any) -> Any:
        largest = jnp.log2(of_block.max(-1))
        top = jnp.where(largest > top + 0.75, largest, top)
        factor = jnp.exp2(8 - jnp.maximum(top, -100))[..., None]  # finite
        return top, _reference.rounded(of_block * factor, jnp.float8_e4m3fn) / factor

    rounded = lax.scan(step, jnp.full((b, n, t), -1e30), by_block, reverse=True)[1]
    return jnp.moveaxis(rounded, 0, 3).reshape(b, n, t, blocks * BLOCK)[..., :s]


def summed(x: Array, y: Array) -> Array:
    """[..., C] and [..., C] to [...]: sums over C as FP8 WGMMA makes them, of products in fp32."""
    total = jnp.zeros(jnp.broadcast_shapes(x.shape, y.shape)[:-1])
    for i in range(0, x.shape[-1], WGMMA_COLUMNS):
        columns = slice(i, i + WGMMA_COLUMNS)
        a, b = x[..., columns], y[..., columns]
        exponents = (_exponent(a) + _exponent(b)).max(-1)
        unit = 2.0 ** (jnp.maximum(exponents, _exponent(total)) - WGMMA_BITS)
        terms = jnp.trunc(a * b / unit[..., None]).sum(-1)
        kept = lax.bitcast_convert_type((terms + jnp.trunc(total / unit)) * unit, jnp.int32)
        total = lax.bitcast_convert_type(kept & (-1 << (23 - WGMMA_BITS)), jnp.float32)
    return total


def weighted(weights: Array, value: Array) -> Array:
    """[B, N, T, V] of [B, N, T, S] and [B, S, N, V]: products with each BLOCK of keys as FP8 WGMMA sums
    them, from the last block to the first, added up in fp32."""
    missing = -value.shape[1] % BLOCK
    blocks = (value.shape[1] + missing) // BLOCK
    weights = jnp.pad(weights, [(0, 0)] * 3 + [(0, missing)])
    value = jnp.pad(value, [(0, 0), (0, missing), (0, 0), (0, 0)])
    weights = jnp.moveaxis(weights.reshape(*weights.shape[:3], blocks, BLOCK), 3, 0)[
        :, :, :, :, None
    ]
    b, _, n, v = value.shape
    value = value.reshape(b, blocks, BLOCK, n, v).transpose(1, 0, 3, 4, 2)[:, :, :, None]

    def step(out: Array, block: Any) -> Any:
        return out + summed(*block), None

    start = jnp.zeros((b, n, weights.shape[3], v))
    return lax.scan(step, start, (weights, value), reverse=True)[0]


def rounding(
    dtype: DTypeLike, stepwise: bool = False, sums_rounded: bool = False
) -> _reference.Rounding:
    """What the kernel rounds: the scores' sums, the weights to e4m3, and out; sums_rounded: it adds up
    the rounded ones. stepwise: its sums of weights times values, too, and weights as it goes from block to
    block; else they are rounded times 2^8."""

    def products(query: Array, key: Array) -> Array:
        query, key = jnp.moveaxis(query, 1, 2)[:, :, :, None], jnp.moveaxis(key, 1, 2)[:, :, None]
        return summed(query, key)

    def rounded_weights(weights: Array) -> Array:
        if stepwise:
            return _stepwise(weights)
        return _reference.rounded(weights * 2**8, jnp.float8_e4m3fn) / 2**8

    def row_sums(weights: Array) -> Array:
        return _reference.row_sums(rounded_weights(weights) if sums_rounded else weights)

    return _reference.Rounding(
        lambda scores: scores,
        lambda weights, total: rounded_weights(weights) / total,
        lambda x: _reference.rounded(x, dtype),
        products,
        weighted if stepwise else _reference.weighted,
        row_sums,
    )


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def oracle(case: Case, inputs: Any, dtype: Any = None, stepwise: bool = False) -> Results:
    """Of fp32 query, key and value: exact, or rounded as the kernel does for results in dtype."""
    round_to = None if dtype is None else rounding(dtype, stepwise, case.H <= SUMS_ROUNDED)
    with jax.default_matmul_precision("highest"):
        return Results(*_reference.attention(*inputs, **case.arguments, round_to=round_to))


def with_means(
    case: Case, rounded: Results, query: Array, key_mean: Any, value_mean: Any, dtype: DTypeLike
) -> Results:
    """out in dtype and lse of whole keys and values, from those of what is left without their means,
    [B, K, H] or None, in fp32: the kernel sees only that."""
    out, lse = rounded.out, rounded.lse
    sees = lse > -jnp.inf
    if value_mean is not None:
        mean = value_mean.repeat(case.N // case.K, axis=1)[:, None]
        out = jnp.where(sees[..., None], out + mean, out)
    if key_mean is not None:
        mean = key_mean.repeat(case.N // case.K, axis=1)
        shift = jnp.einsum("btnh,bnh->btn", query.astype(jnp.float32), mean, precision="highest")
        lse = jnp.where(
            sees, lse + shift * (case.H**-0.5 if case.scale is None else case.scale), lse
        )
    return Results(_reference.rounded(out, dtype), lse)


def with_backward(
    case: Case, results: Results, rounded: Results, seen: Any, cotangents: Any, key_mean: Any
) -> Results:
    """results, and the gradients of 16-bit attention of `seen`, query, key and value as the forward rounded
    them, that go by `rounded`, its out and lse: their weights are the exact ones times a factor of the
    row, and the row's sum of dout * out is of this out. The lse that was given out has the part of
    key_mean, [B, K, H] or None, too."""
    dout, dlse = (x.astype(jnp.float32) for x in cotangents)
    exact = exact_oracle(case, jnp.float32, seen, (dout, dlse))
    sees = jnp.isfinite(rounded.lse)
    factor = jnp.where(sees, jnp.exp(exact.lse - rounded.lse), 1)
    change = jnp.nan_to_num(dout) * jnp.nan_to_num(rounded.out.astype(jnp.float32) - exact.out)
    changed = factor[..., None] * dout, factor * (dlse - change.sum(-1))
    dq, *dkv = exact_oracle(case, jnp.float32, seen, changed)[2:]
    if key_mean is not None:
        mean = key_mean.repeat(case.N // case.K, axis=1)[:, None]
        of_mean = jnp.where(sees, dlse, 0)[..., None] * mean
        dq += of_mean * (case.H**-0.5 if case.scale is None else case.scale)
    return Results(*results[:2], *(_reference.rounded(x, seen[0].dtype) for x in (dq, *dkv)))


def all_dequantized(tensors: Any, scales: Any) -> list[Array]:
    return [jnp.asarray(dequantized(*pair)) for pair in zip(tensors, scales, strict=True)]


def scaled(case: Case, seed: int = 0, shifted: bool = False) -> tuple[Any, Any]:
    """e4m3 query, key and value of a case, NaN planted past the lengths if it says so, and scales
    that differ from block to block. They are powers of two: then a sum is cut off at the same bit
    whether its terms were scaled or not. shifted: values have mean 1 and standard deviation 0.3."""
    rng = np.random.default_rng(seed)
    plain = dataclasses.replace(case, planted=False)
    query, key, value = map(np.asarray, plain.inputs(jnp.float32, seed))
    if shifted:
        value = 1 + np.float32(0.3) * value
    pairs = [quantized(x) for x in (query, key, value)]
    tensors, scales = map(list, zip(*pairs, strict=True))
    scales = [2 ** np.round(np.log2(s) + rng.uniform(-2, 1, s.shape)) for s in scales]
    if case.planted:
        names = "query_seq_lengths", *["key_value_seq_lengths"] * 2
        for x, name in zip(tensors, names, strict=True):
            for entry, length in zip(x, case.mask.get(name, ()), strict=False):
                entry[max(length, 0) :] = np.nan
    return [jnp.asarray(x) for x in tensors], [jnp.asarray(s, jnp.float32) for s in scales]
