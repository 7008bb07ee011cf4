"""MaxText: `attention=jax_fa3` among its configuration keys.

    python -m jax_fa3.integrations.maxtext maxtext.trainers.pre_train.train CONFIG attention=jax_fa3

runs a module of MaxText after `install()`, which a launch script of one's own calls instead.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import runpy
import sys
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import context_parallel
from .._attention import dot_product_attention
from .._mask import key_intervals
from .._problem import Implementation
from ._project import check_version, refuse, refuse_given

KERNEL = "jax_fa3"  # of MaxText's key `attention`
_PADDING = 0  # MaxText's segment id for it


def install(
    *, implementation: Implementation | None = None, deterministic_backward: bool = False
) -> None:
    """Makes "jax_fa3" a value of MaxText's configuration key `attention`.

    MaxText chooses its attention in AttentionOp.apply_attention and has no registry, so this wraps
    that method; for other values of `attention` it does what it did. Training and prefill run on
    `jax_fa3.dot_product_attention`, decoding on MaxText's "dot_product".

    Args: of `jax_fa3.dot_product_attention`.

    MaxText's results, but for padding (segment id 0), whose rows give 0. Attention of types global,
    local_sliding, chunk, full and mla; segments, soft cap, image blocks that see each other, chunked
    prefill; context parallelism over one mesh axis, strategies "all_gather" and "ring", load-balanced
    or not; sinks. The op raises NotImplementedError, while it is traced, for QK-clip's maxima, MoBA,
    indexers, compressed attention and dropout of attention; in context parallelism for image blocks,
    chunked prefill and the reordering "striped", which "auto" means for packed rings on a GPU.
    """
    check_version("maxtext", "0.2.5", "0.2.5")
    module: Any = importlib.import_module("maxtext.layers.attention_op")
    original = inspect.unwrap(module.AttentionOp.apply_attention)
    signature = inspect.signature(original)
    options = {
        "implementation": implementation,
        "deterministic_backward": deterministic_backward,
    }

    @functools.wraps(original)
    def apply_attention(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        if self.attention_kernel != KERNEL:
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        if call.arguments["model_mode"] == "autoregressive":
            return _decode(original, **call.arguments)
        return _attend(options, SimpleNamespace(**call.arguments)), None, None

    module.AttentionOp.apply_attention = apply_attention


def _decode(original: Any, self: Any, use_ragged_attention: bool, **arguments: Any) -> Any:
    """As MaxText's own "flash" does on a GPU: the numbers of several caches are merged by the caller,
    and this library returns none that are not normalized."""
    if use_ragged_attention:
        return original(self, use_ragged_attention=True, **arguments)
    known = inspect.signature(self.apply_attention_dot).parameters
    return self.apply_attention_dot(**{k: x for k, x in arguments.items() if k in known})


def _attend(options: dict[str, Any], call: Any) -> Array:
    """[B, T, N, V] of the arguments of apply_attention, by name; query is scaled already."""
    self, query, previous_chunk = call.self, call.query, call.previous_chunk
    image = call.bidirectional_mask
    refuse_given(
        indexer_mask=call.indexer_mask,
        compressed_mask=call.compressed_mask,
        record_max_logits=call.record_max_logits,
        moba=self.config.moba,
        dropout_rate=self.dropout_rate,
    )
    kind = self.attention_type.value
    if kind not in ("global", "local_sliding", "chunk", "full", "mla"):
        raise refuse("attention_type", kind, "global, local_sliding, chunk, full or mla")
    key, value = (x.dequant() if hasattr(x, "dequant") else x for x in (call.key, call.value))
    self.check_attention_inputs(query, key, value)

    parts, zigzag = self._context_parallel_size(), self._load_balanced_context_parallel()
    rows, keys = query.shape[1], key.shape[1]
    offset = 0 if previous_chunk is None else previous_chunk.shape[1]
    masks: dict[str, Any] = {"is_causal": kind != "full", "query_offset": offset}
    if kind == "local_sliding":
        masks["local_window_size"] = self.sliding_window_size - 1, 0
    if kind == "chunk":
        where = context_parallel.zigzag_positions(rows, parts) if zigzag else jnp.arange(rows)
        where = jnp.broadcast_to(where + offset, query.shape[:2])
        # Reordered sequences have chunks that count from the start of each document, as in MaxText.
        starts = call.segment_positions
        counted = starts if zigzag and starts is not None else where
        masks["key_begin"] = where - counted % self.chunk_attn_window_size
    ids, key_ids = call.decoder_segment_ids, call.decoder_segment_ids_kv
    if ids is not None:
        masks["query_segment_ids"] = ids[:, offset : offset + rows]
        masks["key_value_segment_ids"] = ids if key_ids is None else key_ids
        masks["padding_segment_id"] = _PADDING
    options = options | {"scale": 1.0, "logits_soft_cap": self.attn_logits_soft_cap}
    options["sinks"] = call.sinks
    options["checkpoint_name"] = "context"  # by which MaxText's remat policies save attention
    if parts > 1:
        _check_context_parallel(self, zigzag, previous_chunk, image)
        return context_parallel.dot_product_attention(
            query, key, value, **_split(self), zigzag=zigzag, **masks, **options
        )
    if image is not None:
        refuse_given(previous_chunk=previous_chunk)
        begin, end = key_intervals(rows, keys, **masks)
        begin, end = _with_blocks(begin, end, image)
        masks = {"key_begin": begin, "key_end": end}
    return dot_product_attention(query, key, value, **masks, **options)


def _with_blocks(begin: Array, end: Array, image: Array) -> tuple[Array, Array]:
    """Intervals [B, T] in which the rows of each run of image [B, T] see all of that run besides.

    Such a row sees itself, so what it saw and its run are one interval.
    """
    image = image != 0
    before = jnp.pad(image, ((0, 0), (1, 0)))[:, :-1]
    after = jnp.pad(image, ((0, 0), (0, 1)))[:, 1:]
    index = jnp.arange(image.shape[1], dtype=jnp.int32)
    first = lax.cummax(jnp.where(image & ~before, index, 0), axis=1)
    last = lax.cummin(jnp.where(image & ~after, index + 1, image.shape[1]), axis=1, reverse=True)
    alone = image & (begin == end)  # padding; a greater begin marks a segment that is torn apart
    joined = image & (begin < end)
    begin = jnp.where(joined, jnp.minimum(begin, first), jnp.where(alone, first, begin))
    end = jnp.where(joined, jnp.maximum(end, last), jnp.where(alone, last, end))
    return begin, end


def _check_context_parallel(
    self: Any, zigzag: bool, previous_chunk: Any, bidirectional_mask: Any
) -> None:
    if previous_chunk is not None or bidirectional_mask is not None:
        wanted = "neither with context parallelism"
        raise refuse("previous_chunk, bidirectional_mask", "one of them", wanted)
    order = getattr(self.config.context_parallel_reorder_strategy, "value", None)
    if order == "auto" and self.config.packing and self.config.context_parallel_strategy == "ring":
        order = "striped" if "gpu" in self.config.hardware else order
    if zigzag and order == "striped":
        wanted = "dual_chunk_swap, for this library's context parallelism has no striped order"
        raise refuse("context_parallel_reorder_strategy", order, wanted)


def _split(self: Any) -> dict[str, Any]:
    """How MaxText's rules split query [B, T, N, H], and its strategy."""
    batch, heads, length, _ = self._logical_to_mesh_axes(self.flash_axis_names_q)
    if isinstance(length, tuple) and len(length) == 1:
        (length,) = length
    if not isinstance(length, str):
        raise refuse("logical_axis_rules", f"{length} for the sequence", "one mesh axis")
    strategy = self.config.context_parallel_strategy
    if strategy not in ("all_gather", "ring"):
        raise refuse("context_parallel_strategy", strategy, "all_gather or ring")
    sharding = NamedSharding(self.mesh, PartitionSpec(batch, length, heads))
    return {"axis_name": length, "strategy": strategy, "sharding": sharding}


if __name__ == "__main__":
    install()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
