"""A stand-in for the parts of AXLearn that its adapter touches: names, arguments and meanings of
apple/axlearn's axlearn/common/flash_attention/utils.py at 4574891, and common.py at f4f5bd1."""

import dataclasses
import functools
from typing import Any

import axlearn_biases
import jax
import jax.numpy as jnp
import stand_ins


@dataclasses.dataclass(frozen=True)
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

    def name(self) -> str:
        return type(self).__name__

    def _log_unsupported(self, reason: str) -> bool:
        del reason
        return False

    def is_supported(self, input_batch: Any, kv_cache_type: Any) -> bool:
        del kv_cache_type
        query, key, value = (input_batch[x].shape for x in ("query", "key", "value"))
        if key != value or (query[0], query[3]) != (key[0], key[3]) or query[2] % key[2]:
            raise ValueError(f"Expects shapes that fit, got {query}, {key} and {value}")
        return True


class ReferenceMHA(BaseFlashAttention):
    @functools.partial(jax.jit, static_argnames=["self"])
    def __call__(self, input_batch: Any) -> Any:
        query, key, value = (input_batch[x] for x in ("query", "key", "value"))
        query = query * self.cfg.softmax_scale
        repeats = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
        scores = jnp.einsum("btnh,bsnh->bnts", query, key)
        bias = input_batch["bias"].value()
        scores = scores if bias is None else scores + bias.astype(scores.dtype)
        sink = input_batch.get("logit_sink")
        if sink is not None:
            sink = jnp.broadcast_to(sink[:, None, None], (*scores.shape[:3], 1))
            scores = jnp.concatenate([scores, sink], axis=-1)
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(value.dtype)
        return jnp.einsum("bnts,bsnh->btnh", weights[..., : key.shape[1]], value)


BACKENDS = {"gpu": [ReferenceMHA], "cpu": [ReferenceMHA]}


def flash_attention_implementation(
    backend: str,
    *,
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    logit_sink: Any = None,
    softmax_scale: float = 1.0,
    kv_cache_type: Any = None,
    dropout_rate: float | None = 0.0,
    page_tables: Any = None,
) -> Any:
    """It has block sizes as well."""
    batch = {"query": query, "key": key, "value": value, "bias": bias}
    batch |= {"page_tables": page_tables, "logit_sink": logit_sink}
    for kind in BACKENDS[backend]:
        cfg = kind.default_config().set(
            dropout_rate=dropout_rate or 0.0, softmax_scale=softmax_scale
        )
        op = cfg.instantiate()
        if op.is_supported(input_batch=batch, kv_cache_type=kv_cache_type):
            return op
    return None


def axlearn() -> Any:
    flash = "axlearn.common.flash_attention"
    common = BaseFlashAttention, ReferenceMHA
    function = flash_attention_implementation
    modules = {
        "axlearn.common.attention_bias": lambda: dict(vars(axlearn_biases)),
        f"{flash}.common": lambda: {x.__name__: x for x in common},
        f"{flash}.utils": lambda: {function.__name__: function, "BACKENDS": BACKENDS},
    }
    return stand_ins.installed("axlearn", modules)
