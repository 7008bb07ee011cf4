"""Which code runs a call: the kernels, or plain JAX.

Arguments and machine are judged at trace time (`choose`), the platform at lowering (`run`), so a
program for CUDA can be lowered on a machine without a GPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import numpy as np
from jax import Array, lax

from . import _bias, _devices, _dropout, _ffi, _guards, _mask_bits, _sharding
from ._checks import wrong
from ._jitted import jitted
from ._kernel_sizes import BWD_TILES, MOST_KEYS_OF_SUM, drifts
from ._operands import Call, Operands
from ._problem import Implementation

FirstFa3 = tuple[Literal["fa3"], Literal["xla"]]  # None, but without its warning
ELSEWHERE = "use implementation='xla'"
NO_KERNELS = (
    "jax_fa3: got an install without CUDA kernels, wanted one with them: reinstall it on Linux (in a "
    f"checkout, whose folder jax_fa3 has none, start Python elsewhere), or {ELSEWHERE}"
)


def refusal(call: Call) -> str | None:
    """Why the kernels cannot take these arguments, and what to do about it; None if they can."""
    reason = refusal_of_options(call)
    if reason is not None:
        return reason
    sizes, dtype = call.operands.sizes, call.operands.query.dtype
    query, value = ("query", "value") if call.operands.packed is None else ("qkv", "qkv")
    if dtype.name not in ("bfloat16", "float16"):
        wanted = "wanted bfloat16 or float16: cast it, as compute_dtype=jnp.bfloat16 does"
        return f"{query}: got dtype {dtype}, {wanted}, or {ELSEWHERE}"
    dims = {query: sizes.head_dim, value: sizes.head_dim_v}
    reason = refusal_of_build(max(dims, key=dims.__getitem__), dtype, *sizes[-2:])
    if reason is not None:
        return reason
    for name, dim in dims.items():
        if dim % 8:
            wanted = "wanted a multiple of 8: pad it with zeros"
            return f"{name}: got head dim {dim}, {wanted}, or {ELSEWHERE}"
    keys = sizes.key_length
    if _ffi.is_wide(*sizes[-2:]) and drifts(keys):
        found = f"{'key' if query == 'query' else 'qkv'}: got {keys} keys of head dims {sizes[-2:]}"
        return f"{found}, wanted at most {MOST_KEYS_OF_SUM}, or {ELSEWHERE}"
    return None


def refusal_of_options(call: Call) -> str | None:
    """`refusal`, as far as it does not depend on dtype and head dims."""
    mask, dropout = call.operands.mask, call.config.dropout
    reason = _bias.refusal_of_terms(call.config, call.operands)
    if reason is None and mask is not None and _mask_bits.are_intervals(mask):
        got = "key_begin: got several intervals a row"
        with_dropout = f"{got} beside dropout, wanted one of the two" if dropout else None
        reason = with_dropout or _mask_bits.refusal(call.operands, got)
    if reason is None and dropout:
        reason = _dropout.refusal(call.operands.sizes)
    if reason is not None:
        return f"{reason}, or {ELSEWHERE}"
    if call.operands.scale is not None:
        wanted = "wanted a static float: multiply query by it and pass scale=1.0"
        return f"scale: got a traced value, {wanted}, or {ELSEWHERE}"
    return refusal_of_scales(call.config.scale, call.config.logits_soft_cap)


def refusal_of_scales(scale: float, cap: float | None) -> str | None:
    if not _is_positive_float32(scale):
        wanted = "wanted a positive float32: multiply query instead"
        return f"scale: got {scale}, {wanted}, or {ELSEWHERE}"
    if cap is not None and not _is_positive_float32(cap):
        return f"logits_soft_cap: got {cap}, wanted a positive float32, or {ELSEWHERE}"
    return None


def refusal_of_build(
    name: str, dtype: np.dtype, head_dim: int, head_dim_v: int, *, wide: bool = True
) -> str | None:
    """Why this install has no kernel for these; name: of the argument to blame; wide: whether the
    kernels for heads wider than 256 count."""
    built = [(h, v) for kernel, h, v in _ffi.kernels() if kernel == dtype.name]
    built = [dims for dims in built if wide or not _ffi.is_wide(*dims)]
    if not any(h >= head_dim and v >= head_dim_v for h, v in built):
        found = f"head dims ({head_dim}, {head_dim_v}) in {dtype}"
        return f"{name}: got {found}, wanted at most one of those built: {built}, or {ELSEWHERE}"
    return None


def refusal_of_gradient(operands: Operands) -> str | None:
    """Why the kernels have no gradient of these operands, though they have the forward."""
    dims, widest = operands.sizes[-2:], BWD_TILES[-1].head_dim
    if max(dims) <= widest:
        return None
    name = "query" if operands.packed is None else "qkv"
    found = f"a gradient at head dims {dims}"
    return f"{name}: got {found}, wanted at most {widest} there, or {ELSEWHERE}"


def _is_positive_float32(x: float) -> bool:
    limits = np.finfo(np.float32)
    return float(limits.tiny) <= x <= float(limits.max)


def machine_refusal() -> str | None:
    """Why this machine's CUDA devices cannot run the kernels; None if one can, or there is none."""
    capabilities = compute_capabilities()
    if not capabilities:
        return None
    if "9.0" not in capabilities:
        found = ", ".join(sorted(capabilities))
        wanted = f"wanted an NVIDIA Hopper GPU (9.0, sm_90): {ELSEWHERE}"
        return f"device: got compute capability {found}, {wanted}"
    if not _ffi.is_built():
        return NO_KERNELS
    driver, wanted = _ffi.cuda_versions()
    if 0 < driver // 1000 < wanted // 1000:  # a runtime goes with all drivers of its major version
        newer = f"wanted one for CUDA {wanted // 1000}.0 or newer: update it"
        return f"device: got an NVIDIA driver for CUDA {_cuda(driver)}, {newer}, or {ELSEWHERE}"
    return None


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def is_mixed() -> bool:
    """Whether this process has Hopper GPUs and other GPUs."""
    return "9.0" in compute_capabilities() and len(compute_capabilities()) > 1


def refusal_of_devices(arrays: Iterable[Any]) -> str | None:
    """Why a call of these arrays, as it stands here, runs on a GPU that cannot run the kernels."""
    others = [x for x in _devices.meant(arrays) if not _devices.is_hopper(x)] if is_mixed() else []
    if not others:
        return None
    found = f"{others[0]}, compute capability {getattr(others[0], 'compute_capability', None)}"
    return f"device: got {found}, wanted this process's Hopper GPU: move the arrays, or {ELSEWHERE}"


def compute_capabilities() -> set[str]:
    """Of this process's CUDA devices, such as {"9.0"}; initialises JAX's backends."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:  # JAX's answer where there is no such backend
        return set()
    return {str(device.compute_capability) for device in devices}


def checked_implementation(implementation: Any) -> Implementation | FirstFa3 | None:
    """The user's, with no more left of a sequence than what `choose` has to know: "xla" and None take
    every call, so what comes behind is never tried; and None tries "fa3" itself."""
    given = implementation if isinstance(implementation, (tuple, list)) else (implementation,)
    for x in given or [()]:
        if x == "cudnn":
            raise wrong("implementation", repr(x), "'fa3', its equal here, or None or 'xla'")
        if x not in (None, "fa3", "xla"):
            raise wrong("implementation", repr(x), "None, 'fa3' or 'xla', or a sequence of them")
    last: Any = next((x for x in given if x != "fa3"), "fa3")
    return ("fa3", "xla") if last == "xla" and given[0] == "fa3" else last


def choose(
    implementation: Implementation | FirstFa3 | None,
    refused: str | None = None,
    *,
    stacklevel: int = 1,
) -> Implementation | None:
    """The implementation for `run`: the user's, but None becomes "xla" where kernels cannot run.

    Args:
        implementation: from `checked_implementation`.
        refused: why the arguments rule the kernels out, if they do.
        stacklevel: of the warning that a Hopper GPU stays unused, as in warnings.warn.

    Raises NotImplementedError if "fa3" was asked for and arguments or machine rule it out.
    """
    if implementation == "xla":
        return "xla"
    reason = refused or machine_refusal()
    if isinstance(implementation, tuple):
        return None if reason is None else "xla"
    if reason is None:
        return implementation
    if implementation == "fa3":
        raise NotImplementedError(f"implementation='fa3': {reason}")
    if "9.0" in compute_capabilities():
        text = f"jax_fa3 leaves its Hopper kernels unused and runs this on XLA. {reason}"
        warnings.warn(text, stacklevel=stacklevel + 1)
    return "xla"


@jitted(static=6)
def run(
    implementation: Implementation | None,
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    static: tuple[Any, ...],
    letters: tuple[Any, ...],
    results: tuple[str, ...],
    *operands: Any,
) -> tuple[Array, ...]:
    """kernel(*static, *operands) on CUDA and plain(*static, *operands) on all other platforms, run
    by each device on its own part.

    "xla" is plain everywhere; with "fa3" lowering for another platform raises. Jitted, for the
    platform of an eager call is that of its operands, not JAX's default one. Without "fa3", in a
    process with other GPUs than Hopper's too, those on which it will run count likewise.

    Args:
        letters, results: of operands and results, as for _sharding.per_device.
    """
    kernel, plain = functools.partial(kernel, *static), functools.partial(plain, *static)
    if implementation == "xla":
        return plain(*operands)
    call = by_platform(implementation, kernel, plain)
    return _sharding.per_device(call, letters, results)(*operands)


def by_platform(
    implementation: Literal["fa3"] | None, kernel: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """kernel on CUDA and plain elsewhere, for `run`."""

    def refused(*operands: Any) -> Any:
        return plain(*jax.tree.map(_guards.never_lowered, operands))

    def where_hopper(*operands: Any) -> Any:
        return lax.cond(_devices.lowered_for(), kernel, plain, *operands)

    default = plain if implementation is None else refused
    on_cuda = where_hopper if implementation is None and is_mixed() else kernel

    def call(*operands: Any) -> tuple[Array, ...]:
        return lax.platform_dependent(*operands, cuda=on_cuda, default=default)

    return call
