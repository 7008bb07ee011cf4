"""The attention_fn of Flax's own layers, linen's and nnx's alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Unpack

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from .._arguments import Options
from .._attention import dot_product_attention
from .._checks import array, wrong
from .._values import window_size
from . import _weights
from ._mask_to_intervals import mask_to_intervals as to_intervals
from ._precision import matmul_precision


def make_attention_fn(
    *,
    mask_to_intervals: bool = False,
    **options: Unpack[Options],
) -> Callable[..., Array]:
    """For `attention_fn` of flax.linen.MultiHeadDotProductAttention and flax.nnx.MultiHeadAttention.

    The layer's outputs and gradients are those it has with Flax's own function, but for rows that
    see no key: they give 0, not the mean of all values.

    Args:
        mask_to_intervals: runs the layer's `mask` through `jax_fa3.flax.mask_to_intervals`; a row of it
            that is not one interval of keys gives NaN. False passes it on as it is, as the function's
            own `mask`.
        options: of `jax_fa3.dot_product_attention`, but dropout, which is the layer's.
            compute_dtype=jnp.bfloat16 for layers with dtype=None, which pass on float32: without it
            nothing is ever cast down, and the kernels take 16 bits only. Masks, such as
            is_causal=True, instead of the layer's. Arrays
            (lengths, segment ids, key_begin and key_end) go to layers with one batch axis; a
            function made inside the model's __call__ may hold those of the step.

    Returns:
        `attention_fn(query, key, value, *, mask=None, ...)` with [..., T, N, H], [..., S, K, H],
        [..., S, K, V] -> [..., T, N, V]. It names every argument that either layer passes, for
        linen drops those that it does not find in the signature. With dropout every batch entry and
        head has its own, whatever broadcast_dropout says. `precision` is that of the XLA
        path's products of fp32, the higher of a pair; the kernels' products of 16-bit numbers are
        exact in fp32, which meets every one. With sow_weights the layer stores its weights as with
        Flax's function, computed beside the result by XLA.

    The function raises at trace time:
        NotImplementedError: an einsum of the layer's own; input_positions, as rotary embeddings are the
            layers'; "fa3" with float32.
        ValueError: a precision that JAX does not know; is_causal or local_window_size with T != S
            and no query_offset: the function cannot know where the rows stand among the keys.
    """
    of_the_layer = "dropout_rate", "dropout_key"
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        known = (x for x in Options.__annotations__ if x not in of_the_layer)
        raise TypeError(
            f"make_attention_fn: got {', '.join(sorted(unknown))}, wanted options of "
            f"jax_fa3.dot_product_attention: {', '.join(known)}"
        )
    for name in of_the_layer:
        if options.get(name) is not None:
            raise wrong(name, "one", "none: the layer passes its own")
    if mask_to_intervals and not {"key_begin", "key_end"}.isdisjoint(options):
        wanted = "one of the two: they all become key_begin and key_end"
        raise wrong("mask_to_intervals", "True beside key_begin or key_end", wanted)

    def attention_fn(
        query: Array,
        key: Array,
        value: Array,
        *,
        mask: ArrayLike | None = None,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,  # the softmax is always in fp32
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        is_causal: bool = False,
        input_positions: Any = None,
    ) -> Array:
        del broadcast_dropout, force_fp32_for_softmax
        _refuse(
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            input_positions=input_positions,
        )
        arguments: dict[str, Any] = dict(options) | {
            "is_causal": options.get("is_causal", False) or is_causal
        }
        if dropout_rate and not deterministic:
            arguments |= {"dropout_rate": dropout_rate, "dropout_key": dropout_rng}
        query, key, value = map(array, ("query", "key", "value"), (query, key, value))
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.ndim < 3:
                raise wrong(name, f"shape {x.shape}", "(..., length, heads, head dim)")
        _check_alignment(arguments, query.shape[-3], key.shape[-3])

        dtype = dtype or jnp.result_type(query, key, value)  # as Flax promotes them
        batch = query.shape[:-3]
        if mask is not None:
            mask = _one_batch_axis(mask, batch)
            if mask_to_intervals:
                rows = math.prod(batch), query.shape[-3]
                intervals = (jnp.broadcast_to(x, rows) for x in to_intervals(mask))
                arguments |= dict(zip(("key_begin", "key_end"), intervals, strict=True))
                mask = None
            else:
                mask = mask != 0
        query, key, value = (
            x.astype(dtype).reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)
        )
        with matmul_precision(precision):
            if module is not None:
                _weights.sow(module, batch, query, key, mask=mask, **arguments)
            out = dot_product_attention(query, key, value, mask=mask, **arguments)
        return out.reshape(*batch, *out.shape[1:])

    return attention_fn


_REASONS = {
    "qk_attn_weights_einsum": "None: the products are the kernel's own",
    "attn_weights_value_einsum": "None: the products are the kernel's own",
    "input_positions": "None: jax_fa3.flax.nnx.MultiHeadAttention has rotary embeddings",
}


def _refuse(**arguments: Any) -> None:
    """Raises for each that is not what stands for "leave it"."""
    for name, x in arguments.items():
        if x is not None:
            raise NotImplementedError(f"{name}: got {x}, wanted {_REASONS[name]}")


def _check_alignment(arguments: Any, query_length: int, key_length: int) -> None:
    masked = arguments["is_causal"] or window_size(arguments.get("local_window_size")) is not None
    if masked and query_length != key_length and "query_offset" not in arguments:
        name = "is_causal" if arguments["is_causal"] else "local_window_size"
        wanted = (
            "as many keys as queries. To decode, give the layer an attention_fn made with "
            "mask_to_intervals=True alone (Flax passes a mask then), or use the layers of "
            "jax_fa3.flax; elsewhere pass query_offset, 0 for alignment at the top left"
        )
        raise wrong(name, f"{query_length} queries and {key_length} keys", wanted)


def _one_batch_axis(mask: ArrayLike, batch: tuple[int, ...]) -> Array:
    """[B or 1, 1 or N, 1 or T, 1 or S]."""
    mask = array("mask", mask)
    mask = mask.reshape((1,) * (3 - mask.ndim) + mask.shape)
    if len(batch) != 1:
        mask = jnp.broadcast_to(mask, (*batch, *mask.shape[-3:]))
        return mask.reshape(math.prod(batch), *mask.shape[-3:])
    return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
