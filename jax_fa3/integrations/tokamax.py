"""tokamax: `tokamax.dot_product_attention(..., implementation=[Attention("fa3"), "triton", "xla"])`.

tokamax takes callables among the names of its implementations, and goes on to the next one where one
raises NotImplementedError. So nothing is registered, and tokamax itself is not imported here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .. import _arguments, _mask_bits, _tensors
from .._attention import dot_product_attention
from .._problem import Implementation
from ._project import check_version, refuse, refuse_given


@dataclasses.dataclass(frozen=True)
class Attention:
    """An implementation for `tokamax.dot_product_attention`, called as tokamax calls its own ops.

    Args:
        implementation: of `jax_fa3.dot_product_attention`. With "fa3", what the kernels do not run
            (no Hopper GPU, float32, a bias beside some head dims, ...) is refused, and tokamax takes the
            next implementation of the list; with None it runs on this library's XLA path.
        deterministic_backward: as there.

    tokamax's results, but for rows that see no key: they give 0, not the mean of all values. Masks in
    which each row of a batch entry sees one interval of keys, the same for all heads, reach the
    kernels (tokamax's is_causal, local_window_size and sequence lengths; its Mask's causal_mask,
    k_start, k_end, q_start and q_end) as intervals; others become a dense mask, which the kernels take
    as bits, up to head dim 128. Where they might not, "fa3" refuses it.

    Calling raises NotImplementedError for what no implementation here has: dropout, paging, quantized
    arrays, logits_dtype other than fp32, two precisions, normalize_output=False, return_residuals,
    k_sharding, and q_sharding of other than one batch axis; with "fa3" also for logits_soft_cap
    together with bias, which only the XLA path has.
    """

    implementation: Implementation | None = None
    deterministic_backward: bool = False

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        precision: Any = None,
        logits_dtype: Any = None,
        logits_scale: Any = None,
        bias: Array | None = None,
        logits_soft_cap: float | None = None,
        mask: Any = None,
        is_causal: bool = False,
        dropout_mask: Array | None = None,
        dropout_rate: float = 0.0,
        paging_info: Any = None,
        q_sharding: jax.sharding.NamedSharding | None = None,
        k_sharding: jax.sharding.NamedSharding | None = None,
        q_indices: Array | None = None,
        k_indices: Array | None = None,
        normalize_output: bool = True,
        return_residuals: bool = False,
    ) -> Array:
        check_version("tokamax", "0.0.17", "0.0.17")
        refuse_given(
            dropout_mask=dropout_mask,
            dropout_rate=dropout_rate,
            paging_info=paging_info,
            k_sharding=k_sharding,
            return_residuals=return_residuals,
        )
        _check(q, k, v, logits_dtype, normalize_output)
        if q_sharding is not None and q.ndim != 4:
            raise refuse("q_sharding", f"it for q {q.shape}", "one batch axis, (B, T, N, H)")

        batch = q.shape[:-3]
        masks, dense = _masks(mask, is_causal, q, k, q_indices, k_indices)

        def one_batch_axis(x: Array) -> Array:
            """[*#B, N or 1, T or 1, S or 1] to [B or 1, ...]."""
            x = jax.lax.broadcast_to_rank(x, len(batch) + 3)
            if math.prod(x.shape[: len(batch)]) != 1:
                x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
            return x.reshape(-1, *x.shape[-3:])

        tensors = [x.reshape(math.prod(batch), *x.shape[-3:]) for x in (q, k, v)]
        arguments = masks | {
            "bias": None if bias is None else one_batch_axis(bias),
            "mask": None if dense is None else one_batch_axis(dense),
            "scale": logits_scale if _given(logits_scale) else None,
            "logits_soft_cap": logits_soft_cap,
            "soft_cap_last": bias is not None and logits_soft_cap is not None,
        }
        if dense is not None and self.implementation == "fa3":
            _check_any_mask(tensors, arguments)
        with _matmul_precision(precision, q.dtype):
            out = dot_product_attention(
                *tensors,
                sharding=q_sharding,
                implementation=self.implementation,
                deterministic_backward=self.deterministic_backward,
                **arguments,
            )
        return out.reshape(*batch, *out.shape[1:])


def _given(x: Any) -> bool:
    """Whether an argument is neither None nor the class AUTO, tokamax's mark for a default."""
    return x is not None and getattr(x, "__name__", None) != "AUTO"


def _check(q: Any, k: Any, v: Any, logits_dtype: Any, normalize_output: bool) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Array):
            raise refuse(name, type(x).__name__, "a plain array: this library dequantizes nothing")
        if x.dtype != q.dtype:
            raise refuse(name, f"dtype {x.dtype}", f"{q.dtype}, as q has")
    wide = jnp.promote_types(q.dtype, jnp.float32)
    if _given(logits_dtype) and jnp.dtype(logits_dtype) != wide:
        raise refuse("logits_dtype", jnp.dtype(logits_dtype), f"{wide}, as scores always have")
    if not normalize_output:
        raise refuse("normalize_output", False, "True")


def _check_any_mask(tensors: list[Array], arguments: dict[str, Any]) -> None:
    """Raises where the kernels might find out, when they run, that they cannot take a dense mask."""
    operands = _arguments.parse(*_tensors.separate(*tensors), **arguments).operands
    reason = _mask_bits.refusal(operands)
    if operands.bias is not None:
        reason = "mask: got one beside a bias, wanted one of the two"
    if reason is not None:
        raise NotImplementedError(reason)


def _matmul_precision(precision: Any, dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which the XLA path multiplies as asked. The products of 16-bit numbers are exact,
    and summed in fp32, whatever it is."""
    if isinstance(precision, (tuple, list)):
        first, second = precision
        if first != second:
            raise refuse("precision", precision, "the same for both products")
        precision = first
    default = None, jax.lax.Precision.DEFAULT, jax.lax.DotAlgorithmPreset.DEFAULT
    if precision in default or dtype.itemsize == 2:
        return contextlib.nullcontext()
    name = precision if isinstance(precision, str) else precision.name
    return jax.default_matmul_precision(name if name.isupper() and "_" in name else name.lower())


def _masks(
    mask: Any,
    is_causal: bool,
    q: Array,
    k: Array,
    q_indices: Array | None,
    k_indices: Array | None,
) -> tuple[dict[str, Any], Array | None]:
    """Mask arguments of jax_fa3.dot_product_attention, and what they cannot say, as a dense mask.

    Args:
        mask: an array, tokamax's CausalMask or its Mask.
        q_indices, k_indices: [*#B, #N, T], [*#B, #K, S], the positions that masks are about; by
            default those in the arrays.
    """
    if isinstance(mask, Array):
        mask = types.SimpleNamespace(bool_mask=mask)
    elif hasattr(mask, "window_size"):
        mask = types.SimpleNamespace(causal_mask=mask)
    bool_mask, causal, q_start, q_end, k_start, k_end = (getattr(mask, x, None) for x in _PARTS)
    batch, plain = q.shape[:-3], q_indices is None and k_indices is None
    rows = jnp.arange(q.shape[-3]) if q_indices is None else q_indices
    keys = jnp.arange(k.shape[-3]) if k_indices is None else k_indices
    arguments: dict[str, Any] = {}
    lowest, end = [], []  # row i sees key j only if lowest <= j < end; [*#B, #N, #T]
    dense = [] if bool_mask is None else [bool_mask]  # [*#B, #N, #T, #S]

    low, high = _relative(causal, is_causal)
    if plain and isinstance(high, int) and isinstance(low, int | None):
        arguments |= {"is_causal": True, "query_offset": high}
        if low is not None and low <= high:
            arguments["local_window_size"] = high - low, 0
        elif low is not None:
            end.append(jnp.int32(0))
    else:
        lowest += [] if low is None else [rows + low]
        end += [] if high is None else [rows + high + 1]

    for bound, visible in (
        (q_start, lambda x: rows[..., None] >= x[..., None, :]),
        (q_end, lambda x: rows[..., None] < x[..., None, :]),
    ):
        if bound is None:
            continue
        if bound.shape[-1] != 1:  # one for each key
            dense.append(visible(bound))
        elif bound is q_end and q_indices is None and not _by_head(bound):
            arguments["query_seq_lengths"] = _spread(bound, batch, 1)[:, 0]
        else:
            end.append(jnp.where(visible(bound)[..., 0], jnp.iinfo(jnp.int32).max, 0))
    if k_end is not None and k_end.shape[-1] == 1 and k_indices is None and not _by_head(k_end):
        arguments["key_value_seq_lengths"] = _spread(k_end, batch, 1)[:, 0]
        k_end = None
    lowest += [] if k_start is None else [k_start]
    end += [] if k_end is None else [k_end]

    for name, bounds, visible, combine in (
        ("key_begin", lowest, jnp.greater_equal, jnp.maximum),
        ("key_end", end, jnp.less, jnp.minimum),
    ):
        for bound in bounds:
            if k_indices is not None or _by_head(bound):
                dense.append(visible(keys[..., None, :], bound[..., None]))
            else:
                bound = _spread(bound, batch, q.shape[-3])
                arguments[name] = combine(arguments.get(name, bound), bound)
    return arguments, functools.reduce(jnp.logical_and, dense) if dense else None


_PARTS = "bool_mask", "causal_mask", "q_start", "q_end", "k_start", "k_end"


def _relative(causal: Any, is_causal: bool) -> tuple[Any, Any]:
    """Row i sees key j only if low <= j - i <= high; each an int, a traced scalar or None."""
    high, window = (None, None) if causal is None else (causal.offset, causal.window_size)
    low = None if window is None else high - window + 1
    if is_causal:
        high = min(high or 0, 0) if isinstance(high, int | None) else jnp.minimum(high, 0)
    return low, high


def _by_head(x: Array) -> bool:
    """Of [*#B, #N, T], whether it differs from head to head."""
    return x.ndim > 1 and x.shape[-2] != 1


def _spread(x: Array, batch: tuple[int, ...], length: int) -> Array:
    """[*#B, 1, #T] to [B, T]."""
    x = jax.lax.broadcast_to_rank(x, len(batch) + 2)
    return jnp.broadcast_to(x, (*batch, 1, length)).reshape(-1, length)
