"""Stand-ins for the parts of AXLearn and MaxDiffusion that their adapters touch. Neither is on PyPI in a
version that has its hook, so where they are not installed the adapters are tested with these: written from
their sources' interfaces, each with the attention that the project runs without a kernel."""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

NEG_INF = -1e15


@contextmanager
def installed(project: str, modules: dict[str, Callable[[], dict[str, Any]]]) -> Iterator[None]:
    """The project itself, or its stand-in for as long."""
    if importlib.util.find_spec(project) is not None:
        yield
        return
    names = {
        ".".join(name.split(".")[:i]) for name in modules for i in range(1, name.count(".") + 2)
    }
    made = {name: ModuleType(name) for name in names}
    for module in made.values():
        module.__path__ = []
    sys.modules |= made
    try:
        for name, contents in modules.items():
            vars(made[name]).update(contents())
        yield
    finally:
        for name in made:
            del sys.modules[name]


# AXLearn: axlearn/common/attention_bias.py, flash_attention/common.py and utils.py


@struct.dataclass
class _Bias:
    def has_value(self) -> bool:
        return True


@struct.dataclass
class _Zero(_Bias):
    def has_value(self) -> bool:
        return False

    def value(self) -> None:
        return None


@struct.dataclass
class _Bool(_Bias):
    def value(self) -> Any:
        return jnp.where(self.bool_value(), 0, NEG_INF)

    def bool_value(self) -> Any:
        raise NotImplementedError


@struct.dataclass
class SegmentIdAttentionBias(_Bool):
    segment_ids: Any = None

    def bool_value(self) -> Any:
        return (self.segment_ids[:, :, None] == self.segment_ids[:, None])[:, None]


@struct.dataclass
class MaskFnAttentionBias(_Bool):
    mask: Any = struct.field(pytree_node=False, default=None)
    shape: Any = struct.field(pytree_node=False, default=None)
    target_positions: Any = None

    def bool_value(self) -> Any:
        rows, keys = jnp.indices(self.shape, sparse=True)
        rows = rows[None]
        if self.target_positions is not None:
            rows = self.target_positions[..., None]
            if rows.ndim == 2:
                rows = (rows + jnp.arange(self.shape[0]))[..., None]
        return self.mask(rows, keys[None])[:, None]


@struct.dataclass
class CausalAttentionBias(MaskFnAttentionBias):
    mask: Any = struct.field(pytree_node=False, default=lambda row, key: row >= key)


@struct.dataclass
class SlidingWindowAttentionBias(MaskFnAttentionBias):
    sliding_window_size: int = struct.field(pytree_node=False, default=0)

    def bool_value(self) -> Any:
        size = self.sliding_window_size

        def seen(row: Any, key: Any) -> Any:
            return (row >= key) & (row - key <= size)

        return MaskFnAttentionBias.bool_value(dataclasses.replace(self, mask=seen))


@struct.dataclass
class TensorAttentionBias(_Bias):
    tensor: Any = None

    def value(self) -> Any:
        return self.tensor


@struct.dataclass
class CompositeAttentionBias(_Bias):
    biases: Any = ()

    def has_value(self) -> bool:
        return any(x.has_value() for x in self.biases)

    def value(self) -> Any:
        return functools.reduce(jnp.add, [x.value() for x in self.biases if x.has_value()])


def split(bias: Any, *kinds: type) -> Iterator[Any]:
    left = list(bias.biases) if isinstance(bias, CompositeAttentionBias) else [bias]
    for kind in kinds:
        found = [x for x in left if isinstance(x, kind)]
        left = [x for x in left if not isinstance(x, kind)]
        yield found[0] if found else _Zero()
    yield CompositeAttentionBias(left)


@dataclasses.dataclass
class _Config:
    make: Any
    softmax_scale: float = 1.0
    dropout_rate: float = 0.0

    def set(self, **values: Any) -> Any:
        return dataclasses.replace(self, **values)

    def instantiate(self) -> Any:
        return self.make(self)


class BaseFlashAttention:
    def __init__(self, cfg: Any):
        self.cfg = cfg

    @classmethod
    def default_config(cls) -> Any:
        return _Config(cls)

    def _log_unsupported(self, reason: str) -> bool:
        del reason
        return False

    def is_supported(self, input_batch: Any, kv_cache_type: Any) -> bool:
        del kv_cache_type
        if input_batch["query"].shape[3] != input_batch["key"].shape[3]:
            raise ValueError("Expects query head dim to be equal to key head dim")
        return True


class ReferenceMHA(BaseFlashAttention):
    def __call__(self, batch: Any) -> Any:
        query, key, value = (batch[x] for x in ("query", "key", "value"))
        query = query * self.cfg.softmax_scale
        repeats = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
        scores = jnp.einsum("btnh,bsnh->bnts", query, key)
        if batch["bias"].has_value():
            scores = scores + batch["bias"].value()
        sink = batch.get("logit_sink")
        if sink is not None:
            sink = jnp.broadcast_to(sink[:, None, None], (*scores.shape[:3], 1))
            scores = jnp.concatenate([scores, sink], axis=-1)
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(value.dtype)
        return jnp.einsum("bnts,bsnh->btnh", weights[..., : key.shape[1]], value)


def axlearn() -> Any:
    flash = "axlearn.common.flash_attention"
    biases = {
        x.__name__: x
        for x in (
            CausalAttentionBias,
            CompositeAttentionBias,
            MaskFnAttentionBias,
            SegmentIdAttentionBias,
            SlidingWindowAttentionBias,
            TensorAttentionBias,
        )
    }
    modules = {
        "axlearn.common.attention_bias": lambda: biases | {"split": split},
        f"{flash}.common": lambda: {
            "BaseFlashAttention": BaseFlashAttention,
            "ReferenceMHA": ReferenceMHA,
        },
        f"{flash}.utils": lambda: {"BACKENDS": {"gpu": [ReferenceMHA]}},
    }
    return installed("axlearn", modules)


# MaxDiffusion: models/attention_dispatch.py


def _dot_product(query: Any, key: Any, value: Any, context: Any) -> Any:
    """Of [B, T, N * H]."""
    heads = context["heads"]
    query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * context["scale"]
    if context.get("attention_mask") is not None:
        scores += jnp.where(context["attention_mask"], 0, -1e30)[:, None, None]
    weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(value.dtype)
    out = jnp.einsum("bnts,bsnh->btnh", weights, value)
    return out.reshape(*out.shape[:2], -1)


def maxdiffusion() -> Any:
    registry: dict[str, Any] = {"dot_product": _dot_product}

    def register_kernel(name: str) -> Any:
        return functools.partial(registry.__setitem__, name)

    contents = SimpleNamespace(register_kernel=register_kernel, KERNEL_REGISTRY=registry)
    return installed(
        "maxdiffusion", {"maxdiffusion.models.attention_dispatch": lambda: vars(contents)}
    )
