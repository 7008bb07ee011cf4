"""AXLearn: the first of `BACKENDS["gpu"]` of its FlashAttention layer, after `install()`."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._attention import dot_product_attention
from .._broken import marked
from .._problem import Implementation
from .._supported import is_supported
from ._project import hook

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
    the others. Its releases do not have that list: this was written for its sources, as of fc1f41e
    (attention_bias.py), 4574891 (flash_attention/utils.py) and f4f5bd1 (common.py, layer.py), in
    which masks come with the positions of rows and keys.

    Args:
        implementation, deterministic_backward: of `jax_fa3.dot_product_attention`.
        device: of `jax_fa3.is_supported`: "sm_90" where programs are compiled ahead on a machine
            without such a GPU.

    On the kernels: causal and sliding masks, as intervals of keys by their positions, segment ids,
    sinks, grouped heads, and head dims up to 512. Keys whose positions decrease somewhere give NaN.
    Other masks and biases are arrays, as wherever the kernels take one. Decoding, paged caches and
    dropout, for which AXLearn draws the weights, are left to the next of the list, and so is what
    `is_supported` says no to. AXLearn's remat policies that save "flash_residuals" save what the
    backward needs.
    """
    flash = "axlearn.common.flash_attention"
    kernels = hook(f"{flash}.utils", "BACKENDS")["gpu"]
    base = hook(f"{flash}.common", "BaseFlashAttention")
    biases: Any = importlib.import_module("axlearn.common.attention_bias")
    options = {
        "implementation": implementation,
        "deterministic_backward": deterministic_backward,
        "checkpoint_name": CHECKPOINT_NAME,
    }

    class Attention(base):
        def name(self) -> str:
            return NAME

        def is_supported(self, input_batch: Any, kv_cache_type: Any) -> bool:
            if kv_cache_type is not None or input_batch.get("page_tables") is not None:
                return self._log_unsupported("it does not decode.")
            if not super().is_supported(input_batch, kv_cache_type):
                return False
            if self.cfg.dropout_rate:
                return self._log_unsupported("it does not draw AXLearn's dropout.")
            arguments = _arguments(biases, self.cfg, input_batch)
            reason = is_supported(**arguments, device=device, implementation=implementation)
            return reason is None or self._log_unsupported(reason)

        @functools.partial(jax.jit, static_argnames=["self"])
        def __call__(self, input_batch: Any) -> Array:
            return dot_product_attention(**_arguments(biases, self.cfg, input_batch), **options)

    others = [x for x in kernels if x.__qualname__ != Attention.__qualname__]
    kernels[:] = [Attention, *others]


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
    size = getattr(sliding, "sliding_window_size", None)
    masks = [mask]
    if size is None:  # none, or the functions of several windows joined in one
        masks.append(sliding)
    else:
        causal = sliding  # a window is causal, and rows and keys have the same positions in both
    if causal.has_value():
        shape = query.shape[:2]
        intervals = _intervals(causal.target_positions, causal.source_positions, size)
        bounds = (jnp.broadcast_to(x, shape) for x in intervals)
        arguments |= zip(("key_begin", "key_end"), bounds, strict=True)
    if segments.has_value():
        ids = segments.segment_ids
        arguments |= {"query_segment_ids": ids, "key_value_segment_ids": ids}
    given = [x.bool_value() for x in masks if x.has_value()]
    if given:
        arguments["mask"] = functools.reduce(jnp.logical_and, given)
    if rest.has_value():
        arguments["bias"] = rest.value()
    if batch.get("logit_sink") is not None:
        arguments["sinks"] = batch["logit_sink"]
    return arguments


def _intervals(rows: Array, keys: Array, size: int | None) -> tuple[Array, Array]:
    """The keys that are not after each row, and at most size before it: [B or 1, T] each. Of the positions
    of rows, [B or 1, T], and of keys, [B or 1, S], which must not decrease: where they do rows give NaN."""
    before, rows = keys[:, None, :], rows[:, :, None]
    end = (before <= rows).sum(-1, dtype=jnp.int32)
    begin = jnp.zeros_like(end)
    if size is not None:
        begin = (before < rows - size).sum(-1, dtype=jnp.int32)
    unordered = (keys[:, 1:] < keys[:, :-1]).any(-1, keepdims=True)
    return marked(unordered, begin, end)
