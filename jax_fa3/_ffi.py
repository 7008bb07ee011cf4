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
SEGMENT_INTERVALS = "jax_fa3.segment_intervals.v1"
TARGETS = (FWD, SEGMENT_INTERVALS)

_UNBOUNDED = 2**62
_FARTHEST = 2**61  # far beyond every int32 position, and sums with one still fit int64

# What an install without kernels lowers for: the default build, (dtype, head_dim, head_dim_v).
_HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
_DEFAULT_KERNELS = [(dtype, *dims) for dtype in ("bfloat16", "float16") for dims in _HEAD_DIMS]


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
    """The forward kernels as (dtype, greatest head_dim, greatest head_dim_v)."""
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
    num_heads_q, num_heads_k = num_heads or (query.shape[2], key.shape[2])
    batch, query_length = query.shape[:2]
    out_dtype = jnp.float32 if config.partial else query.dtype
    absent = jnp.zeros(0, jnp.int32)
    operands = vary_together(
        [query, key, value, *(absent if mask is None else mask for mask in masks)]
    )
    left, right = map(_window_attribute, config.window)
    results = jax.ffi.ffi_call(
        FWD,
        (
            jax.ShapeDtypeStruct((batch, query_length, num_heads_q, value.shape[3]), out_dtype),
            jax.ShapeDtypeStruct((batch, num_heads_q, query_length), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),  # workspace: the counter of tiles
        ),
    )(
        *operands,
        scale=np.float32(config.scale),
        soft_cap=np.float32(config.logits_soft_cap or 0),
        window_left=left,
        window_right=right,
        num_heads_q=num_heads_q,
        num_heads_k=num_heads_k,
        first_head_q=first_head[0],
        first_head_k=first_head[1],
        first_head_v=first_head[2],
    )
    out, lse = (_vary(x, _varying(operands[0])) for x in results[:2])
    return out, lse


def segment_intervals(
    query_segment_ids: Array, key_value_segment_ids: Array
) -> tuple[Array, Array]:
    """The kernel for _mask.segment_intervals: key_begin and key_end, int32 [B, T]."""
    operands = vary_together([query_segment_ids, key_value_segment_ids])
    result = jax.ShapeDtypeStruct(query_segment_ids.shape, jnp.int32)
    results = jax.ffi.ffi_call(SEGMENT_INTERVALS, (result, result))(*operands)
    key_begin, key_end = (_vary(x, _varying(operands[0])) for x in results)
    return key_begin, key_end


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
