"""The attention layer for flax.linen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import default_kernel_init
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array

from .._attention import dot_product_attention
from .._checks import Integers, wrong
from .._problem import Implementations, Window
from . import _dropout, _layer
from ._cache import Cache
from ._layer import KernelAxes, MaskArrays


class MultiHeadAttention(nn.Module):
    """Multi-head attention on `jax_fa3.dot_product_attention`.

    Its parameters are those of flax.linen.MultiHeadDotProductAttention, and so is its cache, so
    checkpoints go from one to the other; with num_kv_heads the kernels of key and value have K
    heads, as in flax.nnx.MultiHeadAttention.

    Attributes:
        num_heads: N.
        num_kv_heads: K, a divisor of N; None is N.
        qkv_features: N * H of the query; None is the features of inputs_q.
        out_features: of the output; None is the features of inputs_q.
        dtype: of the computation; None takes that of inputs and parameters. The kernels need
            bfloat16 or float16.
        param_dtype, precision, use_bias, normalize_qk: as in Flax's layer.
        kernel_init, bias_init, out_kernel_init, out_bias_init: as in Flax's layer.
        is_causal, local_window_size, logits_soft_cap, scale: as in `jax_fa3.dot_product_attention`.
        deterministic_backward, implementation: as in `jax_fa3.dot_product_attention`.
        dropout_rate: of the weights, in calls with deterministic=False; `deterministic` is its default.
        rotary_base: rotates query and key by their positions, with this base (10000 in the paper);
            None does not.
        kernel_axes: logical names of the axes (features, heads) of all kernels and biases, for
            flax.linen.get_partition_spec and logical_to_mesh_sharding; None leaves them bare.
        decode: whether calls read and extend a cache, in the collection "cache" (to be mutable).
            `init` makes it, as long as its inputs are; each call then takes the next T >= 1
            positions, one or a whole prompt.
        attention_fn: another function to be called as `jax_fa3.dot_product_attention`, with the
            arguments that are not at their defaults: jax.nn's with implementation="cudnn", say.
        padding_segment_id: as in `jax_fa3.dot_product_attention`, for calls that pass segment ids.
        use_sinks: a parameter `sinks` [N] more, zeros at first, as in `jax_fa3.dot_product_attention`.
    """

    num_heads: int
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    use_bias: bool = True
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = nn.initializers.zeros
    out_kernel_init: Initializer | None = None
    out_bias_init: Initializer | None = None
    normalize_qk: bool = False
    is_causal: bool = False
    local_window_size: int | Window | None = None
    logits_soft_cap: float | None = None
    scale: float | None = None
    rotary_base: float | None = None
    kernel_axes: KernelAxes = None
    decode: bool = False
    deterministic_backward: bool = False
    implementation: Implementations | None = None
    attention_fn: Callable[..., Any] = dot_product_attention
    padding_segment_id: int | None = None
    use_sinks: bool = False
    dropout_rate: float = 0.0
    deterministic: bool | None = None

    @nn.compact
    @_layer.documented
    def __call__(
        self, inputs_q: Array, inputs_k: Array | None = None, inputs_v: Array | None = None, *,
        positions: Integers | None = None, deterministic: bool | None = None,
        **masks: Unpack[MaskArrays],
    ) -> Array:  # fmt: skip
        inputs_q, inputs_k, inputs_v = _layer.checked_inputs(inputs_q, inputs_k, inputs_v)
        features = inputs_q.shape[-1]
        qkv_features = features if self.qkv_features is None else self.qkv_features
        num_kv_heads, head_dim = _layer.check_heads(
            self.num_heads, self.num_kv_heads, qkv_features, self.rotary_base
        )
        query, key, value = (
            self._dense(name, (heads, head_dim), self.kernel_init, self.bias_init)(x)
            for name, heads, x in (
                ("query", self.num_heads, inputs_q),
                ("key", num_kv_heads, inputs_k),
                ("value", num_kv_heads, inputs_v),
            )
        )
        if self.normalize_qk:
            norm = functools.partial(
                nn.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
            )
            query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)

        sinks = self._sinks() if self.use_sinks else None
        if self.decode and not self.is_initializing():
            out = self._step(query, key, value, positions, masks, sinks)
        else:
            if self.decode:
                self._cache(key, value)
            dropout = _dropout.arguments(self, lambda: self.make_rng("dropout"), deterministic)
            out, _ = _layer.attend(
                self, query, key, value, positions, masks, sinks=sinks, **dropout
            )
        return self._dense(
            "out",
            features if self.out_features is None else self.out_features,
            self.out_kernel_init or self.kernel_init,
            self.out_bias_init or self.bias_init,
        )(out)

    def _step(
        self, query: Array, key: Array, value: Array, positions: Any, masks: Any, sinks: Any
    ) -> Array:
        if not self.has_variable("cache", "cached_key"):
            wanted = 'the one that init returns: pass {"params": ..., "cache": ...}, and mutable=["cache"]'
            raise wrong("decode", "no cache", wanted)
        variables = self._cache(key, value)
        cache = Cache(*(x.value for x in variables))
        out, cache = _layer.attend(self, query, key, value, positions, masks, cache, sinks=sinks)
        assert cache is not None
        for variable, x in zip(variables, cache, strict=True):
            variable.value = x
        return out

    def _sinks(self) -> Array:
        init: Initializer = nn.initializers.zeros
        if self.kernel_axes is not None:
            init = nn.with_logical_partitioning(init, self.kernel_axes[1:])
        return self.param("sinks", init, (self.num_heads,), self.param_dtype)

    def _cache(self, key: Array, value: Array) -> list[nn.Variable]:
        """In the order of Cache."""
        return [
            self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype),
            self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype),
            self.variable("cache", "cache_index", jnp.zeros, (), jnp.int32),
        ]

    def _dense(
        self, name: str, features: Any, kernel_init: Initializer, bias_init: Initializer
    ) -> nn.DenseGeneral:
        if self.kernel_axes is not None:
            embed, heads = self.kernel_axes
            kernel_axes = (heads, None, embed) if name == "out" else (embed, heads, None)
            bias_axes = (embed,) if name == "out" else (heads, None)
            kernel_init = nn.with_logical_partitioning(kernel_init, kernel_axes)
            bias_init = nn.with_logical_partitioning(bias_init, bias_axes)
        return nn.DenseGeneral(
            features,
            axis=(-2, -1) if name == "out" else -1,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            use_bias=self.use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            name=name,
        )
