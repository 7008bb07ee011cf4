"""AXLearn: the first of `BACKENDS["gpu"]` of its FlashAttention layer, after `install()`."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._attention import dot_product_attention
from .._problem import Implementation
from .._supported import is_supported

NAME = "JaxFa3FlashAttention"  # in AXLearn's log
CHECKPOINT_NAME = "flash_residuals"  # by which AXLearn's remat policies save attention


def install(
    *,
    implementation: Implementation | None = None,
    deterministic_backward: bool = False,
    device: str | None = None,
) -> None:
    """Puts these kernels first among those that AXLearn's FlashAttention layer tries on GPUs.

    AXLearn takes the first of a list of classes whose is_supported says yes, and logs the reasons of
    the others. It has no releases: this was written for its sources of 2026 (34aed43).

    Args:
        implementation, deterministic_backward: of `jax_fa3.dot_product_attention`.
        device: of `jax_fa3.is_supported`: "sm_90" where programs are compiled ahead on a machine
            without such a GPU.

    On the kernels: causal and sliding masks with their target positions, segment ids, sinks, grouped
    heads, which AXLearn's cuDNN kernel has repeated, and head dims up to 256. Other masks and biases
    are arrays, as wherever the kernels take one. Decoding and dropout are left to the next of the list,
    and so is what `is_supported` says no to. AXLearn's remat policies that save "flash_residuals" save
    what the backward needs.
    """
    flash = "axlearn.common.flash_attention"
    utils, common = (importlib.import_module(f"{flash}.{x}") for x in ("utils", "common"))
    biases: Any = importlib.import_module("axlearn.common.attention_bias")
    options = {
        "implementation": implementation,
        "deterministic_backward": deterministic_backward,
        "checkpoint_name": CHECKPOINT_NAME,
    }

    class Attention(common.BaseFlashAttention):
        def name(self) -> str:
            return NAME

        def is_supported(self, input_batch: Any, kv_cache_type: Any = None) -> bool:
            if not super().is_supported(input_batch, kv_cache_type):
                return False
            if kv_cache_type is not None:
                return self._log_unsupported("it does not decode.")
            if self.cfg.dropout_rate:
                return self._log_unsupported("it has no dropout.")
            arguments = _arguments(biases, self.cfg, input_batch)
            reason = is_supported(**arguments, device=device, implementation=implementation)
            return reason is None or self._log_unsupported(reason)

        @functools.partial(jax.jit, static_argnames=["self"])
        def __call__(self, input_batch: Any) -> Array:
            return dot_product_attention(**_arguments(biases, self.cfg, input_batch), **options)

    others = [x for x in utils.BACKENDS["gpu"] if x.__qualname__ != Attention.__qualname__]
    utils.BACKENDS["gpu"][:] = [Attention, *others]


def _arguments(axlearn: Any, cfg: Any, batch: Any) -> dict[str, Any]:
    """Of jax_fa3.dot_product_attention, by name."""
    query, key = batch["query"], batch["key"]
    kinds = (
        axlearn.CausalAttentionBias,
        axlearn.SlidingWindowAttentionBias,
        axlearn.SegmentIdAttentionBias,
        axlearn.MaskFnAttentionBias,
    )
    causal, sliding, segments, mask, rest = axlearn.split(batch["bias"], *kinds)
    arguments: dict[str, Any] = {"query": query, "key": key, "value": batch["value"]}
    arguments |= {"scale": cfg.softmax_scale, "compute_dtype": query.dtype}
    ends, begins = [], []  # [B or 1, T], of the masks with positions of rows
    for bias in (causal, sliding):
        if not bias.has_value():
            continue
        where = _positions(bias.target_positions, query.shape[1])
        size = getattr(bias, "sliding_window_size", None)
        if where is None:
            arguments["is_causal"] = True
            arguments |= {} if size is None else {"local_window_size": (size, 0)}
        else:
            ends.append(where + 1)
            begins += [] if size is None else [where - size]
    for name, bounds, tightest in (
        ("key_begin", begins, jnp.maximum),
        ("key_end", ends, jnp.minimum),
    ):
        if bounds:
            shape = query.shape[:2]
            arguments[name] = functools.reduce(
                tightest, [jnp.broadcast_to(x, shape) for x in bounds]
            )
    if segments.has_value():
        ids = segments.segment_ids
        arguments |= {"query_segment_ids": ids, "key_value_segment_ids": ids}
    if mask.has_value():
        arguments["mask"] = mask.bool_value()
    if rest.has_value():
        arguments["bias"] = rest.value()
    if batch.get("logit_sink") is not None:
        arguments["sinks"] = batch["logit_sink"]
    return arguments


def _positions(target_positions: Array | None, rows: int) -> Array | None:
    """[B, T], of the rows among the keys: [B] is of the first."""
    if target_positions is None or target_positions.ndim == 2:
        return target_positions
    return target_positions[:, None] + jnp.arange(rows)
