"""The custom calls: registration, and one function for each kind of call."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import _alibi, _api_version, _bias, _mask_bits, _plan, _relative_bias
from ._custom_call import attributes_of, custom_call
from ._kernel_sizes import BWD_ROWS, KERNELS, BwdTile, bwd_tile
from ._operands import PER_HEAD, Operands, Rows
from ._problem import Config, Masks
from ._targets import BWD, BWD_PACKED, FWD, SEGMENT_INTERVALS


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
    """Whether this install has kernels."""
    return _C is not None and bool(_C.kernels())


def kernels() -> list[tuple[str, int, int]]:
    """The kernels as (dtype, greatest head_dim, greatest head_dim_v), in the order of choice; an
    install without kernels, Python alone or of JAX_FA3_CUDA=OFF, lowers for those of the default build."""
    return (_C and _C.kernels()) or KERNELS


def is_wide(head_dim: int, head_dim_v: int) -> bool:
    """Whether the kernels for them are those of cpp/wide and cpp/wide_bwd."""
    return max(head_dim, head_dim_v) > 256


def cuda_versions() -> tuple[int, int]:
    """The newest CUDA that the NVIDIA driver runs, 0 without a driver, and the one that the kernels
    are linked with; such as 13000. Of an install with kernels."""
    assert _C is not None
    return _C.driver_version(), _C.runtime_version()


def register() -> None:
    """Tells JAX of the handlers, if there are any; initialises no backend."""
    if _C is None:
        return
    _api_version.check(_C.ffi_api_version(), _api_version.of_runtime())
    for name, handler in _C.ffi_targets().items():
        jax.ffi.register_ffi_target(name, handler, platform="CUDA", api_version=1)


def fwd(
    config: Config,
    operands: Operands,
    masks: Masks,
    before: tuple[Array, Array] | None = None,
    *,
    with_lse_low: bool = False,
) -> tuple[Array, ...]:
    """The forward kernel: out [B, T, N, V] in query's dtype, or fp32 if config.partial, and lse,
    fp32 [B, N, T]; with_lse_low also what lse lost to its rounding, for the backward.

    Args:
        operands: bf16 or fp16; a mask is read as bits, or with a bias as -inf in a copy of that.
        before: fp32 results for other keys, to be joined with; they are overwritten.
    """
    batch, length, _, num_heads, _, _, head_dim_v = operands.sizes
    arrays, first_heads, first_column = operands.located()
    others = _others(config, operands)
    is_plain = (
        before is None
        and not config.partial
        and config.window == (None, None)
        and all(x is None for x in (*masks, *others.values()))
    )
    rows = jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32)
    out_dtype = jnp.float32 if config.partial else operands.query.dtype
    results = {
        "out": jax.ShapeDtypeStruct((batch, length, num_heads, head_dim_v), out_dtype),
        "lse": rows,
        "lse_low": rows if with_lse_low else None,
        **_plan.fwd_workspace(_C, operands.sizes, is_plain=is_plain),
    }
    aliases = {} if before is None else {"lse_before": "lse"}
    if before is not None and config.partial:
        aliases["out_before"] = "out"
    out_before, lse_before = before or (None, None)
    found = custom_call(
        FWD,
        results,
        attributes_of(config, operands.heads, first_heads, head_dim_v, first_column),
        aliases=aliases,
        **arrays,
        **masks._asdict(),
        out_before=out_before,
        lse_before=lse_before,
        **others,
    )
    names = ("out", "lse", "lse_low") if with_lse_low else ("out", "lse")
    return tuple(found[name] for name in names)


def bwd(
    config: Config,
    operands: Operands,
    masks: Masks,
    rows: Rows,
    summed_dq: Array | None = None,
    *,
    finish_dq: bool = True,
    with_dbias: bool = True,
) -> tuple[Array, ...]:
    """The backward kernels: (dq, dk, dv), or the gradient of the packed array alone; in the operands'
    dtype, but dk and dv in fp32 if config.partial. Behind them, if there are sinks, theirs, fp32 [B, N],
    that of the bias, that of slopes, fp32 [B, N], and that of relative_bias, fp32 [B, N, T + S].

    Args:
        operands: as for fwd. Key and value side by side may also be uint32 words of two numbers
            each, with more behind them: [B, S, K, *].
        rows: without lse_low gradients at scores of 1e4 and more are less exact.
        summed_dq: what calls with other keys gave for dq without finish_dq; it is overwritten.
        finish_dq: False for a sum of dq, as dq_sum_of says, which only such calls can read.
        with_dbias: False: no gradient of a term of the scores.
    """
    arrays, first_heads, first_column = operands.located()
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    sizes = operands.sizes._replace(head_dim_v=rows.dout.shape[3])
    head_dim, head_dim_v = sizes.head_dim, sizes.head_dim_v
    attributes = attributes_of(config, operands.heads, first_heads, head_dim_v, first_column)
    dq_accum = dq_sum_of(query, sizes.num_heads, head_dim_v)
    others = _others(config, operands, bwd_tile(_bwd_kernel(query, head_dim_v)))
    if "mask_bits" in others:
        masks = _mask_bits.without_blind_rows(masks, rows.lse, sizes.key_length)
    *per_row, width = dq_accum.shape
    if not bwd_tile(width).fused and finish_dq and summed_dq is None:
        dq_accum = jax.ShapeDtypeStruct((*per_row, 0), jnp.float32)
    workspace = _plan.bwd_workspace(_C, config, masks, sizes, query.dtype, dq_accum)
    if with_dbias and operands.bias is not None:
        workspace |= _plan.dbias(config, others["bias"], workspace)
    if with_dbias and operands.alibi_slopes is not None:
        workspace |= _alibi.parts(sizes, workspace)
    if with_dbias and operands.relative_bias is not None:
        workspace |= _relative_bias.parts(config, sizes, workspace)
    if "mask_bits" in others:
        assert operands.mask is not None
        workspace |= _plan.with_mask(operands.mask, sizes, workspace)
    if operands.bias is not None or operands.mask is not None:
        # Rows of which it hides every key: their weights are to be 0.
        rows = rows._replace(lse=jnp.where(rows.lse == -jnp.inf, jnp.inf, rows.lse))
    common: dict[str, Any] = masks._asdict() | rows._asdict() | others
    if operands.sinks is not None:
        workspace["dsinks"] = _plan.dsinks(sizes, dq_accum)

    def with_others(*grads: Array) -> tuple[Array, ...]:
        return *grads, *_plan.gradients_of_others(operands, workspace, found)

    if operands.packed is not None:
        results = {"dqkv": jax.ShapeDtypeStruct(query.shape, query.dtype), **workspace}
        found = custom_call(BWD_PACKED, results, attributes, qkv=query, **common)
        return with_others(found["dqkv"].reshape(operands.query.shape))
    dkv_dtype = jnp.float32 if config.partial else query.dtype
    grads = {
        "dquery": jax.ShapeDtypeStruct(query.shape, query.dtype) if finish_dq else None,
        "dkey": jax.ShapeDtypeStruct((*key.shape[:3], head_dim), dkv_dtype),
        "dvalue": jax.ShapeDtypeStruct((*value.shape[:3], head_dim_v), dkv_dtype),
    }
    found = custom_call(
        BWD,
        {**grads, **workspace},
        attributes,
        aliases={} if summed_dq is None else {"summed_dq": "dq_accum"},
        query=query,
        key=key,
        value=value,
        **common,
        summed_dq=summed_dq,
    )
    return with_others(found["dquery" if finish_dq else "dq_accum"], found["dkey"], found["dvalue"])


def _others(config: Config, operands: Operands, tile: BwdTile | None = None) -> dict[str, Any]:
    """The calls' operands besides query, key, value and masks; tile: the backward's, of its call."""
    others = {name: getattr(operands, name) for name in (*PER_HEAD, "dropout")}
    others["relative_bias"] = _relative_bias.for_kernels(config, operands)
    mask = operands.mask
    if mask is None or operands.bias is not None or _mask_bits.refusal(operands) is not None:
        return others | {"bias": _bias.for_kernels(config, operands)}
    return others | _mask_bits.for_kernels(mask, operands.sizes.key_length, tile)


def _bwd_kernel(query: Array, head_dim_v: int) -> int:
    """Its head dim, of the wider of the two operands."""
    head_dim = query.shape[3]
    built = [x[1:] for x in kernels() if x[0] == query.dtype.name]
    fits = (max(h, v) for h, v in built if h >= head_dim and v >= head_dim_v)
    return next(fits, max(head_dim, head_dim_v))  # an install without kernels can lower, too


def dq_sum_of(query: Array, num_heads: int, head_dim_v: int) -> jax.ShapeDtypeStruct:
    """The fp32 sum of dq in global memory, in an order of the kernel's own: [B, N, rows of whole
    tiles, of whichever height, the head dim that the kernel computes with]."""
    batch, length, *_ = query.shape
    kernel = _bwd_kernel(query, head_dim_v)
    rows = (length + BWD_ROWS - 1) // BWD_ROWS * BWD_ROWS
    width = max(bwd_tile(kernel).head_dim, kernel)
    return jax.ShapeDtypeStruct((batch, num_heads, rows, width), jnp.float32)


def segment_intervals(
    query_segment_ids: Array, key_value_segment_ids: Array
) -> tuple[Array, Array]:
    """The kernel for _mask.segment_intervals: key_begin and key_end, int32 [B, T]."""
    result = jax.ShapeDtypeStruct(query_segment_ids.shape, jnp.int32)
    found = custom_call(
        SEGMENT_INTERVALS,
        {"key_begin": result, "key_end": result},
        {},
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
    )
    return found["key_begin"], found["key_end"]
