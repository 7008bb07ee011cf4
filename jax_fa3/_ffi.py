"""The custom calls: registration, and one function per target that makes the call.

Targets are versioned; the operands of one name never change, or exported programs would break.
"""

from __future__ import annotations

import importlib
import pathlib
import re
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._problem import Config, Masks

_Tree = TypeVar("_Tree")

FWD = "jax_fa3.fwd.v1"
BWD = "jax_fa3.bwd.v1"
BWD_PACKED = "jax_fa3.bwd_packed.v1"
SEGMENT_INTERVALS = "jax_fa3.segment_intervals.v1"
FWD_FP8 = "jax_fa3.fwd_fp8.v1"  # these two are called by fp8/_ffi.py
QUANTIZE = "jax_fa3.quantize.v1"
TARGETS = (FWD, BWD, BWD_PACKED, SEGMENT_INTERVALS, FWD_FP8, QUANTIZE)

_UNBOUNDED = 2**62
_FARTHEST = 2**61  # far beyond every int32 position, and sums with one still fit int64

# Query rows of a backward tile: at least, and a common multiple (cpp/plan.h).
_FEWEST_ROWS, _ROWS = 64, 128

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
    value: Array,
    masks: Masks,
    *,
    num_heads: tuple[int, int] | None = None,
    first_head: tuple[int, int, int] = (0, 0, 0),
) -> tuple[Array, Array]:
    """The forward kernel: out [B, T, N, V] in query's dtype, or fp32 if config.partial, and lse,
    fp32 [B, N, T].

    Args:
        query, key, value: bf16 or fp16 [B, T, *, H], [B, S, *, H], [B, S, *, V], each with the
            heads that are meant from first_head on; the same packed array may stand for all three.
        num_heads: (N, K); as many as query and key have if None.
    """
    heads = num_heads or (query.shape[2], key.shape[2])
    batch, query_length = query.shape[:2]
    results = (
        jax.ShapeDtypeStruct(
            (batch, query_length, heads[0], value.shape[3]), _result_dtype(config, query)
        ),
        jax.ShapeDtypeStruct((batch, heads[0], query_length), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),  # workspace: the counter of tiles
    )
    attributes = attributes_of(config, heads, first_head)
    out, lse, _ = custom_call(FWD, results, attributes, query, key, value, *mask_operands(masks))
    return out, lse


def bwd(
    config: Config,
    query: Array,
    key: Array,
    value: Array,
    masks: Masks,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array,
    *,
    num_heads: tuple[int, int] | None = None,
    first_head: tuple[int, int, int] = (0, 0, 0),
) -> tuple[Array, ...]:
    """The backward kernels: (dq, dk, dv), or with num_heads the gradient of the packed array alone;
    in the operands' dtype, or fp32 if config.partial.

    Args:
        query, key, value, masks, num_heads, first_head: as for fwd.
        out, lse: what fwd gave, or what was made of it, in query's dtype and fp32.
        dout, dlse: their cotangents, in their dtypes.
    """
    heads = num_heads or (query.shape[2], key.shape[2])
    batch, query_length = query.shape[:2]
    operands = (query, key, value) if num_heads is None else (query,)
    grads = [jax.ShapeDtypeStruct(x.shape, _result_dtype(config, x)) for x in operands]
    # Rows of whole tiles, of whichever height.
    rows = (query_length + _ROWS - 1) // _ROWS * _ROWS
    width = _summed_width(query.dtype.name, query.shape[3], value.shape[3])
    turns = batch * heads[0] * rows // _FEWEST_ROWS if config.deterministic_backward else 0
    workspace = (  # cpp/problem.h
        jax.ShapeDtypeStruct((batch, heads[0], rows, 2), jnp.float32),  # log-sum-exp, delta
        jax.ShapeDtypeStruct((batch, rows, 2), jnp.int32),  # key intervals
        jax.ShapeDtypeStruct((batch, rows // _FEWEST_ROWS, 4), jnp.int32),  # their hulls
        jax.ShapeDtypeStruct((batch, heads[0], rows, width), jnp.float32),  # the sum of dq
        jax.ShapeDtypeStruct((turns,), jnp.int32),
    )
    results = custom_call(
        BWD if num_heads is None else BWD_PACKED,
        (*grads, *workspace),
        attributes_of(config, heads, first_head),
        *operands,
        *mask_operands(masks),
        out,
        lse,
        dout,
        dlse,
    )
    return tuple(results[: len(grads)])


def segment_intervals(
    query_segment_ids: Array, key_value_segment_ids: Array
) -> tuple[Array, Array]:
    """The kernel for _mask.segment_intervals: key_begin and key_end, int32 [B, T]."""
    result = jax.ShapeDtypeStruct(query_segment_ids.shape, jnp.int32)
    operands = query_segment_ids, key_value_segment_ids
    key_begin, key_end = custom_call(SEGMENT_INTERVALS, (result, result), {}, *operands)
    return key_begin, key_end


def _result_dtype(config: Config, operand: Array) -> Any:
    return jnp.float32 if config.partial else operand.dtype


def custom_call(
    target: str, results: Any, attributes: dict[str, Any], *operands: Array
) -> list[Array]:
    varying = vary_together(operands)
    found = jax.ffi.ffi_call(target, results)(*varying, **attributes)
    return [_vary(x, _varying(varying[0])) for x in found]


def mask_operands(masks: Masks) -> list[Array]:
    absent = jnp.zeros(0, jnp.int32)
    return [absent if mask is None else mask for mask in masks]


def attributes_of(
    config: Config, num_heads: tuple[int, int], first_head: tuple[int, int, int]
) -> dict[str, Any]:
    left, right = map(_window_attribute, config.window)
    return {
        "scale": np.float32(config.scale),
        "soft_cap": np.float32(config.logits_soft_cap or 0),
        "window_left": left,
        "window_right": right,
        "num_heads_q": num_heads[0],
        "num_heads_k": num_heads[1],
        "first_head_q": first_head[0],
        "first_head_k": first_head[1],
        "first_head_v": first_head[2],
    }


def _summed_width(dtype: str, head_dim: int, head_dim_v: int) -> int:
    """Columns of the fp32 sum of dq in global memory; wide heads have a kernel without one."""
    fits = (h for name, h, v in kernels() if name == dtype and h >= head_dim and v >= head_dim_v)
    kernel = next(fits, max(head_dim, head_dim_v))  # an install without kernels can lower, too
    return 0 if kernel > 128 else 64 if kernel <= 64 else 128


def _window_attribute(distance: int | None) -> int:
    return _UNBOUNDED if distance is None else min(max(distance, -_FARTHEST), _FARTHEST)


def vary_together(arrays: _Tree) -> _Tree:
    """The arrays of a pytree, each varying over all mesh axes of shard_map that any varies over.

    A custom call demands it of its operands. In front of a custom_vjp it keeps gradients right: the
    transpose of this promotion is the sum over the devices among which an operand is replicated.
    """
    axes = frozenset[Any]().union(*map(_varying, jax.tree.leaves(arrays)))
    return jax.tree.map(lambda x: _vary(x, axes), arrays)


def _vary(x: Array, axes: frozenset[Any]) -> Array:
    return jax.lax.pcast(x, tuple(sorted(axes - _varying(x))), to="varying")


def _varying(x: Array) -> frozenset[Any]:
    return jax.typeof(x).manual_axis_type.varying
