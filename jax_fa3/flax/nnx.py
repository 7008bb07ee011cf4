"""The attention layer for flax.nnx."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array

from .._attention import dot_product_attention
from .._checks import Integers, wrong
from .._problem import Implementations, Window
from . import _dropout, _layer
from ._cache import Cache
from ._layer import KernelAxes, MaskArrays


class MultiHeadAttention(nnx.Module):
    """Multi-head attention on `jax_fa3.dot_product_attention`.

    Its variables are those of flax.nnx.MultiHeadAttention, so checkpoints go from one to the other.

    Args:
        num_heads: N.
        in_features: of inputs_q.
        qkv_features: N * H of the query; None is in_features.
        out_features: of the output; None is in_features.
        num_kv_heads: K, a divisor of N; None is N.
        in_kv_features: of inputs_k and inputs_v; None is in_features.
        dtype: of the computation; None takes that of inputs and parameters. The kernels need
            bfloat16 or float16.
        param_dtype, precision, use_bias, normalize_qk, rngs: as in Flax's layer.
        kernel_init, bias_init, out_kernel_init, out_bias_init: as in Flax's layer.
        is_causal, local_window_size, logits_soft_cap, scale: as in `jax_fa3.dot_product_attention`.
        deterministic_backward, implementation: as in `jax_fa3.dot_product_attention`.
        dropout_rate: of the weights, in calls with deterministic=False; `deterministic` is its default.
        padding_segment_id: as in `jax_fa3.dot_product_attention`, for calls that pass segment ids.
        use_sinks: a parameter `sinks` [N] more, zeros at first, as in `jax_fa3.dot_product_attention`.
        rotary_base: rotates query and key by their positions, with this base (10000 in the paper);
            None does not.
        kernel_axes: names of the axes (features, heads) of all kernels and biases, for
            flax.nnx.get_partition_spec; None leaves them bare. nnx shards such variables as it
            makes them: make the layer under jax.set_mesh, or nnx.use_eager_sharding(False).
        decode: whether calls read and extend the cache that `init_cache` makes; each takes the next
            T >= 1 positions, one or a whole prompt.
        attention_fn: another function to be called as `jax_fa3.dot_product_attention`, with the
            arguments that are not at their defaults: jax.nn's with implementation="cudnn", say.

    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        use_bias: bool = True,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = nnx.initializers.zeros,
        out_kernel_init: Initializer | None = None,
        out_bias_init: Initializer | None = None,
        normalize_qk: bool = False,
        is_causal: bool = False,
        local_window_size: int | Window | None = None,
        logits_soft_cap: float | None = None,
        scale: float | None = None,
        padding_segment_id: int | None = None,
        rotary_base: float | None = None,
        kernel_axes: KernelAxes = None,
        decode: bool = False,
        deterministic_backward: bool = False,
        implementation: Implementations | None = None,
        attention_fn: Callable[..., Any] = dot_product_attention,
        use_sinks: bool = False,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        rngs: nnx.Rngs,
    ):
        qkv_features = in_features if qkv_features is None else qkv_features
        out_features = in_features if out_features is None else out_features
        self.num_heads, self.in_features, self.rotary_base = num_heads, in_features, rotary_base
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.num_kv_heads, self.head_dim = _layer.check_heads(
            num_heads, num_kv_heads, qkv_features, rotary_base
        )
        self.is_causal, self.local_window_size, self.scale = is_causal, local_window_size, scale
        self.logits_soft_cap, self.decode = logits_soft_cap, decode
        self.padding_segment_id = padding_segment_id
        self.deterministic_backward, self.precision = deterministic_backward, precision
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        self.implementation: Implementations | None = implementation
        self.attention_fn, self.cache_dtype = attention_fn, dtype or param_dtype

        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        common = {"precision": precision, "use_bias": use_bias, "rngs": rngs, **dtypes}
        embed, heads = (None, None) if kernel_axes is None else kernel_axes

        def initializer(init: Initializer, *axes: str | None) -> Initializer:
            return init if kernel_axes is None else nnx.with_partitioning(init, axes)

        project = functools.partial(
            nnx.LinearGeneral,
            kernel_init=initializer(kernel_init, embed, heads, None),
            bias_init=initializer(bias_init, heads, None),
            **common,
        )
        self.query = project(in_features, (num_heads, self.head_dim))
        self.key = project(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        self.value = project(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        self.query_ln = self.key_ln = nnx.data(None)
        if normalize_qk:
            norm = functools.partial(nnx.LayerNorm, use_bias=False, rngs=rngs, **dtypes)
            self.query_ln, self.key_ln = norm(self.head_dim), norm(self.head_dim)
        self.out = nnx.LinearGeneral(
            (num_heads, self.head_dim),
            out_features,
            axis=(-2, -1),
            kernel_init=initializer(out_kernel_init or kernel_init, heads, None, embed),
            bias_init=initializer(out_bias_init or bias_init, embed),
            **common,
        )
        self.sinks = nnx.data(None)
        if use_sinks:
            init = initializer(nnx.initializers.zeros, heads)
            self.sinks = nnx.Param(init(rngs.params(), (num_heads,), param_dtype))
        self.cached_key = self.cached_value = self.cache_index = nnx.data(None)

    def init_cache(self, input_shape: tuple[int, ...], dtype: Dtype | None = None) -> None:
        """An empty cache for inputs of this shape, [B, L, features] or without B: L positions.

        dtype: None is the layer's dtype, or its param_dtype where that is None.
        """
        shape = (*input_shape[:-1], self.num_kv_heads, self.head_dim)
        dtype = dtype or self.cache_dtype
        self.cached_key = nnx.Cache(jnp.zeros(shape, dtype))
        self.cached_value = nnx.Cache(jnp.zeros(shape, dtype))
        self.cache_index = nnx.Cache(jnp.zeros((), jnp.int32))

    @_layer.documented
    def __call__(
        self, inputs_q: Array, inputs_k: Array | None = None, inputs_v: Array | None = None, *,
        positions: Integers | None = None, decode: bool | None = None,
        deterministic: bool | None = None, rngs: nnx.Rngs | None = None,
        **masks: Unpack[MaskArrays],
    ) -> Array:  # fmt: skip
        inputs_q, inputs_k, inputs_v = _layer.checked_inputs(inputs_q, inputs_k, inputs_v)
        for name, x, features in (
            ("inputs_q", inputs_q, self.in_features),
            ("inputs_k", inputs_k, self.in_kv_features),
            ("inputs_v", inputs_v, self.in_kv_features),
        ):
            if x.shape[-1] != features:
                argument = "in_features" if name == "inputs_q" else "in_kv_features"
                raise wrong(name, f"{x.shape[-1]} features", f"{argument} = {features}")
        query, key, value = self.query(inputs_q), self.key(inputs_k), self.value(inputs_v)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)

        sinks = None if self.sinks is None else self.sinks[...]
        if not (self.decode if decode is None else decode):
            dropout_key = None if rngs is None else rngs.dropout
            dropout = _dropout.arguments(self, dropout_key, deterministic)
            out, _ = _layer.attend(
                self, query, key, value, positions, masks, sinks=sinks, **dropout
            )
            return self.out(out)
        variables: Any = self.cached_key, self.cached_value, self.cache_index
        if self.cached_key is None:
            raise wrong("decode", "no cache", "one: call init_cache(inputs.shape) first")
        cache = Cache(*(x[...] for x in variables))
        out, cache = _layer.attend(self, query, key, value, positions, masks, cache, sinks=sinks)
        assert cache is not None
        for variable, x in zip(variables, cache, strict=True):
            variable[...] = x
        return self.out(out)
