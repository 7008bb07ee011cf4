"""Tunix: its models' `use_flash_attention=True` on these kernels, after `install()`."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._attention import dot_product_attention
from .._problem import Implementation
from ._project import check_version, refuse

MODELS = "tunix.models.qwen2.model", "tunix.models.qwen3.model", "tunix.models.gemma4.model"
_PADDING = 0  # Tunix's segment id for it


def install(
    *, implementation: Implementation | None = None, deterministic_backward: bool = False
) -> None:
    """Makes `use_flash_attention=True` of Tunix's models, Splash attention on TPUs, run on GPUs.

    Those of Tunix's models that have this key (Qwen 2 and 3, Gemma 4) call JAX's Splash attention by
    the name `splash` of their module; this puts `jax_fa3.dot_product_attention` there.

    Args: of `jax_fa3.dot_product_attention`.

    The results are those of Splash attention: causal or sliding masks, and segment ids, whatever the
    model's attn_mask says; the rows of padding (segment id 0) give 0. A sequence that is split over
    devices is refused with NotImplementedError.
    """
    check_version("google-tunix", "0.1.7", "0.1.7")
    splash = _Splash(implementation, deterministic_backward)
    modules: list[Any] = list(map(importlib.import_module, MODELS))
    for module in modules:
        module.splash = splash


class SegmentIds(NamedTuple):
    q: Array  # [T], as kv
    kv: Array


@dataclasses.dataclass(frozen=True)
class _Splash:
    """What Tunix uses of jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel."""

    implementation: Implementation | None
    deterministic_backward: bool
    SegmentIds = SegmentIds

    @staticmethod
    def BlockSizes(**sizes: int) -> None:
        del sizes  # of TPU kernels

    def make_splash_mha(
        self, mask: Any, *, block_sizes: None, head_shards: int, q_seq_shards: int
    ) -> _Kernel:
        """mask: a MultiHeadMask of equal masks, each a CausalMask or a LocalMask."""
        del block_sizes, head_shards
        if q_seq_shards != 1:
            raise refuse("shd_config", f"a sequence over {q_seq_shards} devices", "a whole one")
        first, *others = mask.masks
        if any(x != first for x in others):
            raise refuse("mask", "masks that differ between heads", "the same for all")
        kind = type(first).__name__
        if kind not in ("CausalMask", "LocalMask"):
            raise refuse("mask", kind, "a CausalMask or a LocalMask")
        return _Kernel(self, getattr(first, "window_size", (None, 0)), first.offset)


@jax.tree_util.register_static  # Tunix passes it through a shard_map
@dataclasses.dataclass(frozen=True)
class _Kernel:
    options: _Splash
    window: tuple[int | None, int | None]
    offset: int

    def manual_sharding_spec(self, sharding: Any) -> _Kernel:
        del sharding
        return self  # it has no arrays

    def __call__(
        self, q: Array, k: Array, v: Array, segment_ids: SegmentIds | None = None
    ) -> Array:
        """[N, T, H], [K, S, H], [K, S, V] -> [N, T, V]; q is scaled already."""
        masks: dict[str, Any] = {"query_offset": self.offset}
        masks["local_window_size"] = tuple(
            q.shape[1] + k.shape[1] + abs(self.offset) if x is None else x for x in self.window
        )
        if segment_ids is not None:
            masks["query_segment_ids"], masks["key_value_segment_ids"] = segment_ids
            masks["padding_segment_id"] = _PADDING
        out = dot_product_attention(
            *(jnp.swapaxes(x, 0, 1) for x in (q, k, v)),
            scale=1.0,
            implementation=self.options.implementation,
            deterministic_backward=self.options.deterministic_backward,
            **masks,
        )
        return jnp.swapaxes(out, 0, 1)
