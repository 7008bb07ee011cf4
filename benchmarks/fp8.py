"""The FP8 passes: the forward on inputs that are e4m3 already, and the preparation that makes them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_fa3 import fp8
from jax_fa3.fp8._means import means_of

from . import check
from .check import Rounding, WrongResult, fetch, nearest
from .points import Point
from .timing import Call

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0
# What exp(score - highest score), at most 1, is multiplied by before it becomes e4m3.
WEIGHT_SCALE = 256.0

Arrays = tuple[jax.Array, ...]


def quantized(inputs: Arrays) -> Arrays:
    """query, key, value in e4m3, then their scales, fp32 [B, ceil(T / 128), heads].

    One scale for each array, since cuDNN takes no other: everybody gets the same numbers.
    """
    arrays, scales = zip(*(fp8.quantize(x, quantization="tensor") for x in inputs), strict=True)
    return (*arrays, *scales)


@partial(jax.jit, static_argnames="dtype")
def _product(x, scale, dtype):
    rows = jnp.repeat(scale, fp8.BLOCK, axis=1)[:, : x.shape[1], :, None]
    return (x.astype(jnp.float32) * rows).astype(dtype)


def dequantized(inputs: Arrays, dtype: DTypeLike) -> Arrays:
    """query, key and value of what `quantized` gave."""
    return tuple(_product(*pair, dtype=dtype) for pair in zip(inputs[:3], inputs[3:], strict=True))


def _fa3(point: Point, inputs: Arrays, transposed: bool = False) -> Call:
    """transposed: value as `quantize` writes it for this kernel, the same numbers."""
    attention = partial(
        fp8.quantized_dot_product_attention,
        dtype=jnp.dtype(point.dtype),
        is_causal=point.is_causal,
        value_transposed=transposed,
        implementation="fa3",
    )
    if transposed:
        value = _product(inputs[2], inputs[5], dtype=jnp.float32)
        value, scale = fp8.quantize(value, quantization="tensor", transposed=True)
        inputs = (*inputs[:2], value, *inputs[3:5], scale)
    return Call(jax.jit(attention), inputs)


def cudnn_parameters(inputs: Arrays) -> dict[str, jax.Array]:
    """Scales of what `quantized` gave, for cudnn_fp8."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    descale_q, descale_k, descale_v = (scale[:1, :1, :1, None] for scale in inputs[3:])
    scale_s = jnp.full((1, 1, 1, 1), WEIGHT_SCALE)
    # All names must be there; the forward reads these six.
    params = dict.fromkeys(cudnn.fp8_params_keys, jnp.ones((1, 1, 1, 1)))
    params |= {"descale_q": descale_q, "descale_k": descale_k, "descale_v": descale_v}
    return params | {"scale_s": scale_s, "descale_s": 1 / scale_s, "scale_o": 1 / descale_v}


def cudnn_fp8(
    query: jax.Array, key: jax.Array, value: jax.Array, params: Any, *, is_causal: bool = False
) -> jax.Array:
    """JAX's private FP8 API. Its output is e4m3 as well, here in units of value's scale: attention
    gives means of values, so nothing overflows."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    mask = cudnn.MaskType.CAUSAL if is_causal else cudnn.MaskType.NO_MASK
    scale = query.shape[-1] ** -0.5
    results: Any = cudnn.dot_product_attention(
        query, key, value, scale=scale, mask_type=mask, use_fp8=True, fp8_params=params
    )
    return results[0]  # beside the largest probability and the largest output


def _cudnn(point: Point, inputs: Arrays) -> Call:
    attention = jax.jit(partial(cudnn_fp8, is_causal=point.is_causal))
    return Call(attention, (*inputs[:3], cudnn_parameters(inputs)))


TRANSPOSED = "fa3 fp8, transposed"
CONTENDERS = {
    "fa3 fp8": _fa3,
    TRANSPOSED: partial(_fa3, transposed=True),
    "cudnn fp8": _cudnn,
}


def check_forward(point: Point, inputs: Arrays, out: jax.Array) -> float:
    """Against fp32 maths of the dequantized values; a right kernel rounds exp(score - highest score)
    to e4m3, and its output to its dtype. Otherwise check.check_forward."""
    rounding = Rounding(
        scores=lambda x: x,
        weights=lambda x: nearest(x * WEIGHT_SCALE, E4M3) / WEIGHT_SCALE,
        out=partial(nearest, dtype=point.dtype),
    )
    if out.dtype == E4M3:
        # cuDNN's, in units of value's scale: half the distance of two neighbours on top.
        out = out.astype(jnp.float32) * inputs[5][0, 0, 0]
        rounding = rounding._replace(slack=2**-4)
    return check.check_forward(point, dequantized(inputs, jnp.float32), out, rounding)


MEANS = "fa3 fp8, means"


def _signs(point: Point) -> jax.Array:
    return fp8.random_signs(0, point.head_dim)


def preparation(point: Point, name: str, inputs: Arrays) -> Call:
    """Query and key made incoherent and quantized, value quantized; the same with the means of keys and
    values taken out; or a copy of as many bytes."""
    if name == "copy":
        # With the sign changed: a copy that is no kernel is not among CUPTI's kernel records.
        numbers = jnp.ones(point.moved_bytes() // 8, jnp.float32)
        return Call(jax.jit(jnp.negative), (numbers,))

    quantize = partial(fp8.quantize, implementation="fa3")

    def prepare(query, key, value, signs):
        if name != MEANS:
            return quantize(query, signs=signs), quantize(key, signs=signs), quantize(value)
        of_key, of_value = means = means_of(key, value, None)
        key = quantize(key, signs=signs, mean=of_key)
        return quantize(query, signs=signs), key, quantize(value, mean=of_value), means

    return Call(jax.jit(prepare), (*inputs, _signs(point)))


def _hadamard(head_dim: int) -> np.ndarray:
    """Sylvester's matrix of the largest power of two in head_dim, as often along the diagonal as
    fits; orthonormal."""
    size = head_dim & -head_dim
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(head_dim // size), matrix / np.sqrt(size))


def check_preparation(point: Point, inputs: Arrays, results) -> float:
    """Every scale and number of the first and last head of the first and last batch entry: scales
    that make the block's largest number 448, numbers the nearest that e4m3 has.

    Returns the worst error as a share of what is allowed. Raises WrongResult above 1, or at a NaN.
    """
    if isinstance(results, jax.Array):  # of a copy
        return 0.0
    # In fp64: small numbers are sums of large ones, which fp32 does not give to a thousandth.
    transform = np.asarray(_signs(point), np.float64)[:, None] * _hadamard(point.head_dim)
    worst = 0.0
    means = (None, *(results[3] if len(results) > 3 else (None, None)))
    for what, x, (x8, scale), matrix, mean in zip(
        ("query", "key", "value"),
        inputs,
        results[:3],
        (transform, transform, None),
        means,
        strict=True,
    ):
        for b, n in {(0, 0), (x.shape[0] - 1, x.shape[2] - 1)}:
            truth = fetch(x, b, n) - (0 if mean is None else np.asarray(mean[b, n], np.float64))
            truth = truth if matrix is None else truth @ matrix
            starts = np.arange(0, len(truth), fp8.BLOCK)
            wanted = np.maximum.reduceat(np.abs(truth).max(axis=1), starts) / LARGEST
            got = np.asarray(scale[b, :, n])
            rows = np.repeat(got, fp8.BLOCK)[: len(truth), None]
            error = np.abs(fetch(x8, b, n) * rows - truth)
            # Half the distance of two neighbours: 3 bits of mantissa, or multiples of 2^-9.
            half = np.maximum(np.abs(truth) * 2**-4, rows * 2**-10) * 1.001
            share = max(np.max(np.abs(got / wanted - 1)) / 1e-5, np.max(error / half))
            if not share <= 1:  # a NaN fails too
                raise WrongResult(
                    f"{point.name}: {what} of batch {b}, head {n} is quantized wrongly"
                )
            worst = max(worst, float(share))
    return worst
