"""Gemma: DeepMind's `gemma` package under `with attention():`, by Flax's interception of methods."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from .._attention import dot_product_attention
from .._problem import Implementation
from ._project import check_version, refuse

MODULES = "gemma.gm.nn._modules", "gemma.gm.nn.gemma4._modules"  # each has a class Attention


def attention(
    *, implementation: Implementation | None = None, deterministic_backward: bool = False
) -> AbstractContextManager[None]:
    """A context in which Gemma's layers, where they are traced, attend by
    `jax_fa3.dot_product_attention`:

        with jax_fa3.integrations.gemma.attention():
            logits = model.apply({"params": params}, tokens=tokens).logits

    Gemma writes its attention out in einsums and has no hook, so this is flax.linen.intercept_methods
    of `interceptor`, which can be put among others.

    Args: of `jax_fa3.dot_product_attention`.

    Gemma 1 to 4, training and scoring: calls without a cache, global and sliding layers, soft cap,
    images in text; the results are Gemma's, but for rows that its mask hides all of: they give 0.
    What has a cache, layers that share keys, and Gemma 3n, attend as they did. Masks are arrays there
    and become a dense mask here, which the kernels take where each row sees one interval of keys. Names
    that Gemma gives the weights (`attention_weights`) see nothing.
    """
    linen: Any = importlib.import_module("flax.linen")
    return linen.intercept_methods(interceptor(implementation, deterministic_backward))


def interceptor(
    implementation: Implementation | None = None, deterministic_backward: bool = False
) -> Callable[..., Any]:
    """For flax.linen.intercept_methods; see `attention`."""
    check_version("gemma", "4.0.1", "4.0.1")
    older, newer = (importlib.import_module(name) for name in MODULES)
    options = {
        "implementation": implementation,
        "deterministic_backward": deterministic_backward,
    }

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        own = type(module) in (older.Attention, newer.Attention)
        if context.method_name != "__call__" or not own:
            return call(*args, **kwargs)
        inputs = _Inputs(*args, **kwargs)
        if inputs.cache is not None or inputs.kv_shared_cache is not None:
            return call(*args, **kwargs)
        return _attend(older, module, inputs, options)

    return intercept


class _Inputs(NamedTuple):
    """Of a layer."""

    x: Array
    segment_pos: Array
    cache: Any
    attn_mask: Array
    kv_shared_cache: Any = None


def _attend(gemma: Any, self: Any, inputs: _Inputs, options: dict[str, Any]) -> Any:
    """What a layer returns: a new cache, if it has one without any, and its output."""
    x, segment_pos, _, attn_mask, _ = inputs
    newest = hasattr(self, "rope_proportion")  # Gemma 4
    query, key, value = (_heads_of_4 if newest else _heads)(self, x)
    rope: dict[str, Any] = {"base_frequency": self.rope_base_frequency}
    rope |= {"scale_factor": self.rope_scale_factor}
    rope |= {"rope_proportion": self.rope_proportion} if newest else {}
    rotate = gemma._positional_embeddings.apply_rope
    query, key = (rotate(x, segment_pos, **rope) for x in (query, key))
    mask = attn_mask.astype(bool)
    if self.attn_type.name == "LOCAL_SLIDING":
        if self.sliding_window_size is None:
            raise refuse("sliding_window_size", None, "a number, for a sliding layer")
        near = gemma.create_sliding_mask(segment_pos, sliding_window_size=self.sliding_window_size)
        mask = mask & near
    out = dot_product_attention(
        query if newest else query * self.query_pre_attn_scalar,
        key,
        value,
        mask=jnp.broadcast_to(mask, (x.shape[0], x.shape[1], x.shape[1]))[:, None],
        scale=1.0,
        logits_soft_cap=self.attn_logits_soft_cap,
        **options,
    )
    found = self.attn_vec_einsum("BTNH,NHD->BTD", out)
    return ({"v": value, "k": key} if newest else None), found


def _heads(self: Any, x: Array) -> tuple[Array, Array, Array]:
    """Query, key and value before rotation, of Gemma 1 to 3."""
    if self.use_qkv_einsum:
        query, key, value = self.qkv_einsum("BTD,SNDH->SBTNH", x)
    else:
        query = self.q_einsum("BTD,NDH->BTNH", x)
        key, value = self.kv_einsum("BSD,CKDH->CBSKH", x)
    if self.use_qk_norm:
        query, key = self._query_norm(query), self._key_norm(key)
    return query, key, value


def _heads_of_4(self: Any, x: Array) -> tuple[Array, Array, Array]:
    """The same of Gemma 4."""
    query = self.query_norm(self.q_einsum("BTD,NDH->BTNH", x))
    if self.k_eq_v:
        key = value = self.k_einsum("BSD,KDH->BSKH", x)
    else:
        key, value = self.kv_einsum("BSD,CKDH->CBSKH", x)
    return query, self.key_norm(key), self.value_norm(value)
