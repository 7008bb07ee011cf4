"""The custom calls: registration, and one function per target that makes the call.

Targets are versioned; the operands of one name never change, or exported programs would break.
"""

from __future__ import annotations

import importlib
import pathlib
import re
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array

from . import _plan
from ._custom_call import attributes_of, custom_call, mask_operands
from ._problem import Config, Masks

FWD = "jax_fa3.fwd.v1"
BWD = "jax_fa3.bwd.v1"
BWD_PACKED = "jax_fa3.bwd_packed.v1"
SEGMENT_INTERVALS = "jax_fa3.segment_intervals.v1"
FWD_FP8 = "jax_fa3.fwd_fp8.v1"  # these two are called by fp8/_ffi.py
QUANTIZE = "jax_fa3.quantize.v1"
TARGETS = (FWD, BWD, BWD_PACKED, SEGMENT_INTERVALS, FWD_FP8, QUANTIZE)

# Of the backward (cpp/plan.h): query rows of a tile, at least, and a common multiple; the head dims
# that it computes with, and the widest of which dq is always summed in global memory.
_FEWEST_ROWS, _ROWS = 64, 128
_WIDTHS, _WIDEST_FUSED = (64, 128, 192, 256), 128

# What an install without kernels lowers for: the default build, (dtype, head_dim, head_dim_v).
_HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
_DEFAULT_KERNELS = [(dtype, *dims) for dtype in ("bfloat16", "float16") for dims in _HEAD_DIMS]
_DEFAULT_KERNELS += [("float8_e4m3fn", dim, dim) for dim in (64, 128, 256)]


def _load() -> ModuleType | None:
    """The extension module, or None in a Python-only install; one that is broken raises."""
    try:
        return importlib.import_module("jax_fa3._C")
    except ModuleNotFoundError as error:
        if error.name != "jax_fa3._C":
            raise
        return None


_C = _load()


def is_built() -> bool:
    """Whether this install has the kernels."""
    return _C is not None


def kernels() -> list[tuple[str, int, int]]:
    """The kernels as (dtype, greatest head_dim, greatest head_dim_v), in the order of choice."""
    return _DEFAULT_KERNELS if _C is None else _C.kernels()


def cuda_versions() -> tuple[int, int]:
    """The newest CUDA that the NVIDIA driver runs, 0 without a driver, and the one that the kernels
    are linked with; such as 13000. Of an install with kernels."""
    assert _C is not None
    return _C.driver_version(), _C.runtime_version()


def runtime_api_version() -> tuple[int, int]:
    """Version of the FFI that the installed jaxlib speaks, from its headers."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (
        re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR")
    )
    if major is None or minor is None:
        raise ImportError(f"jax_fa3: no FFI version in the headers of {jax.ffi.include_dir()}")
    return int(major[1]), int(minor[1])


def check_api_version(built: tuple[int, int], runtime: tuple[int, int]) -> None:
    """Raises ImportError where XLA would refuse the handlers, and take the process down later."""
    if built[0] != runtime[0] or built[1] > runtime[1]:
        raise ImportError(
            "jax_fa3: its kernels were built for XLA's FFI {}.{}, but this jaxlib speaks {}.{}: "
            "update jax, or reinstall jax_fa3 from source".format(*built, *runtime)
        )


def register() -> None:
    """Tells JAX of the handlers, if there are any; initialises no backend."""
    if _C is None:
        return
    check_api_version(_C.ffi_api_version(), runtime_api_version())
    for name, handler in _C.ffi_targets().items():
        jax.ffi.register_ffi_target(name, handler, platform="CUDA", api_version=1)


def fwd(
    config: Config,
    query: Array,
    key: Array,
    value: Array | None,
    masks: Masks,
    *,
    num_heads: tuple[int, int] | None = None,
    first_head: tuple[int, int, int] = (0, 0, 0),
    before: tuple[Array, Array] | None = None,
    with_lse_low: bool = False,
) -> tuple[Array, ...]:
    """The forward kernel: out [B, T, N, V] in query's dtype, or fp32 if config.partial, and lse,
    fp32 [B, N, T]; with_lse_low also what lse lost to its rounding, for the backward.

    Args:
        query, key, value: bf16 or fp16 [B, T, *, H], [B, S, *, H], [B, S, *, V], each with the
            heads that are meant from first_head on; the same packed array may stand for all three.
            With value None key holds both, side by side: [B, S, K, H + V].
        num_heads: (N, K); as many as query and key have if None.
        before: fp32 results for other keys, to be joined with; they are overwritten.
    """
    heads = num_heads or (query.shape[2], key.shape[2])
    (batch, query_length, _, head_dim), columns_v = query.shape, 0
    if value is None:
        value, columns_v = key, head_dim
    head_dim_v = value.shape[3] - columns_v
    shape, dtype = (batch, query_length, heads[0], head_dim_v), query.dtype
    results = (
        jax.ShapeDtypeStruct(shape, jnp.float32 if config.partial else dtype),
        jax.ShapeDtypeStruct((batch, heads[0], query_length), jnp.float32),
        jax.ShapeDtypeStruct(
            (batch, heads[0], query_length) if with_lse_low else (0,), jnp.float32
        ),
        jax.ShapeDtypeStruct((1,), jnp.int32),  # workspace: the counter of tiles
        jax.ShapeDtypeStruct(
            (_plan.long_sums(_C, key.shape[1], head_dim, head_dim_v),), jnp.float32
        ),
    )
    absent = jnp.zeros(0, jnp.float32)
    call = query, key, value, *mask_operands(masks), *(before or (absent, absent))
    aliases = {len(call) - 1: 1} | ({len(call) - 2: 0} if config.partial else {})
    attributes = attributes_of(config, heads, first_head, head_dim_v, columns_v)
    found = custom_call(FWD, results, attributes, *call, aliases=aliases if before else {})
    return tuple(found[: 2 + with_lse_low])


def bwd(
    config: Config,
    query: Array,
    key: Array,
    value: Array | None,
    masks: Masks,
    out: Array | None,
    lse: Array,
    dout: Array,
    dlse: Array,
    *,
    lse_low: Array | None = None,
    num_heads: tuple[int, int] | None = None,
    first_head: tuple[int, int, int] = (0, 0, 0),
    summed_dq: Array | None = None,
    finish_dq: bool = True,
) -> tuple[Array, ...]:
    """The backward kernels: (dq, dk, dv), or with num_heads the gradient of the packed array alone;
    in the operands' dtype, but dk and dv in fp32 if config.partial.

    Args:
        query, key, value, masks, num_heads, first_head: as for fwd. Key and value side by side may
            also be uint32 words of two numbers each, with more behind them: [B, S, K, *].
        out, lse, lse_low: what fwd gave, or what was made of it, in query's dtype and fp32.
            Without lse_low gradients at scores of 1e4 and more are less exact.
        dout, dlse: their cotangents, in their dtypes. With out None dlse is dlse - rowsum(dout * out).
        summed_dq: what calls with other keys gave for dq without finish_dq; it is overwritten.
        finish_dq: False for a sum of dq, as dq_sum_of says, which only such calls can read.
    """
    heads = num_heads or (query.shape[2], key.shape[2])
    head_dim, head_dim_v = query.shape[3], dout.shape[3]
    dims = (head_dim,) if num_heads else (head_dim, head_dim, head_dim_v)
    operands = (query,) if num_heads else (query, key, key if value is None else value)
    dtypes = query.dtype, *[jnp.float32 if config.partial else query.dtype] * 2
    grads = [
        jax.ShapeDtypeStruct((*x.shape[:3], dim), dtype)
        for x, dim, dtype in zip(operands, dims, dtypes, strict=False)
    ]
    if not finish_dq:
        grads[0] = jax.ShapeDtypeStruct((0,), query.dtype)
    dq_sum = dq_sum_of(query, heads[0], head_dim_v)
    batch, _, rows, width = dq_sum.shape
    if width > _WIDEST_FUSED and finish_dq and summed_dq is None:
        dq_sum = jax.ShapeDtypeStruct((batch, heads[0], rows, 0), jnp.float32)
    blocks = rows // _FEWEST_ROWS
    turns = batch * heads[0] * blocks if config.deterministic_backward else 0
    ranges = (batch, heads[1], 3) if query.dtype == jnp.float16 else (0,)
    sizes = batch, query.shape[1], key.shape[1], *heads, head_dim, head_dim_v
    splits = _plan.splits(_C, config, masks, sizes)
    parts = (splits, batch, key.shape[1], heads[1], head_dim + head_dim_v) if splits else (0,)
    workspace = (  # cpp/problem.h
        jax.ShapeDtypeStruct((batch, heads[0], blocks, 3 * _FEWEST_ROWS + 4), jnp.float32),
        jax.ShapeDtypeStruct((batch, rows, 2), jnp.int32),  # key intervals
        jax.ShapeDtypeStruct((batch, blocks, 8), jnp.int32),  # what is known of a block of rows
        dq_sum,
        jax.ShapeDtypeStruct((turns,), jnp.int32),
        jax.ShapeDtypeStruct(ranges, jnp.int32),
        jax.ShapeDtypeStruct(parts, jnp.float32),
    )
    results, columns_v = (*grads, *workspace), head_dim if value is None else 0
    attributes = attributes_of(config, heads, first_head, head_dim_v, columns_v)
    out = jnp.zeros(0, query.dtype) if out is None else out
    absent = jnp.zeros(0, jnp.float32)
    low = absent if lse_low is None else lse_low
    call = *operands, *mask_operands(masks), out, lse, dout, dlse, low
    if num_heads:
        return tuple(custom_call(BWD_PACKED, results, attributes, *call)[:1])
    place = len(grads) + workspace.index(dq_sum)
    aliases = {} if summed_dq is None else {len(call): place}
    call += (absent if summed_dq is None else summed_dq,)
    dq, dk, dv, *found = custom_call(BWD, results, attributes, *call, aliases=aliases)
    return dq if finish_dq else found[place - 3], dk, dv


def dq_sum_of(query: Array, num_heads: int, head_dim_v: int) -> jax.ShapeDtypeStruct:
    """The fp32 sum of dq in global memory, in an order of the kernel's own: [B, N, rows of whole
    tiles, of whichever height, the head dim that the kernel computes with]."""
    batch, length, _, head_dim = query.shape
    built = [x[1:] for x in kernels() if x[0] == query.dtype.name]
    fits = (h for h, v in built if h >= head_dim and v >= head_dim_v)
    kernel = next(fits, max(head_dim, head_dim_v))  # an install without kernels can lower, too
    width = next((width for width in _WIDTHS if width >= kernel), kernel)
    rows = (length + _ROWS - 1) // _ROWS * _ROWS
    return jax.ShapeDtypeStruct((batch, num_heads, rows, width), jnp.float32)


def segment_intervals(
    query_segment_ids: Array, key_value_segment_ids: Array
) -> tuple[Array, Array]:
    """The kernel for _mask.segment_intervals: key_begin and key_end, int32 [B, T]."""
    result = jax.ShapeDtypeStruct(query_segment_ids.shape, jnp.int32)
    operands = query_segment_ids, key_value_segment_ids
    key_begin, key_end = custom_call(SEGMENT_INTERVALS, (result, result), {}, *operands)
    return key_begin, key_end
