"""Who runs a point and how, in which passes: this library's ways beside its rivals'."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jax_fa3

from . import check, features, fp8
from .points import Point
from .rivals import ATTENTIONS, Attention, Refused, window
from .timing import Call


def _with_intervals(query, key, value, key_begin, key_end):
    return jax_fa3.dot_product_attention(
        query, key, value, key_begin=key_begin, key_end=key_end, implementation="fa3"
    )


def _fa3(point: Point, **options: Any) -> Attention:
    if point.documents:
        intervals = _key_intervals(point, "fa3")(*_segments(point))
        return Attention(_with_intervals, intervals)
    return Attention(
        partial(
            jax_fa3.dot_product_attention,
            is_causal=point.is_causal,
            local_window_size=window(point),
            implementation="fa3",
            **options,
        )
    )


def _fa3_arrays(point: Point) -> Attention:
    if point.mask != "causal":
        raise Refused("only for causal points")
    end = jnp.broadcast_to(jnp.asarray(point.intervals()[1]), (point.batch, point.seqlen))

    def attention(query, key, value, key_end):
        return jax_fa3.dot_product_attention(
            query, key, value, key_end=key_end, implementation="fa3"
        )

    return Attention(attention, (end,))


CONTENDERS: dict[str, Callable[[Point], Attention]] = {
    "fa3": _fa3,
    "fa3 arrays": _fa3_arrays,  # the same mask, said by key_begin and key_end
    "fa3 full": _fa3,  # the same shapes with no mask: see `problem`
    "fa3 deterministic": partial(_fa3, deterministic_backward=True),
    **ATTENTIONS,
    **features.CONTENDERS,
}


def problem(point: Point, name: str) -> Point:
    """What the contender computes: the point's problem, the same one without its mask, or in place of what
    has no closed form one that does."""
    if name == "fa3" and point.blocks:  # of as many scores
        return dataclasses.replace(point, blocks=False, is_causal=True)
    if name == "fa3":
        return dataclasses.replace(point, first_keys=0)
    if name != "fa3 full":
        return point
    return dataclasses.replace(point, documents=None, is_causal=False, window=None)


def _segments(point: Point) -> tuple[jax.Array, jax.Array]:
    ids = jnp.broadcast_to(jnp.asarray(point.segment_ids()), (point.batch, point.seqlen))
    return ids, ids


def _key_intervals(point: Point, implementation: Any) -> Callable[..., Any]:
    @jax.jit
    def convert(query_segment_ids, key_value_segment_ids):
        return jax_fa3.key_intervals(
            point.seqlen,
            point.seqlen,
            is_causal=point.is_causal,
            local_window_size=window(point),
            query_segment_ids=query_segment_ids,
            key_value_segment_ids=key_value_segment_ids,
            implementation=implementation,
        )

    return convert


def _normal(point: Point) -> tuple[jax.Array, ...]:
    """query, key, value and, for the passes that take it, the cotangent of out."""
    lengths = (point.seqlen, point.keys, point.keys, point.seqlen)
    heads = (point.num_heads_q, point.num_heads_k, point.num_heads_k, point.num_heads_q)
    dims = (point.head_dim, point.head_dim, point.head_dim_v, point.head_dim_v)
    keys = jax.random.split(jax.random.key(0), 4 if "bwd" in point.pass_name else 3)
    # Drawn in bf16, the largest number of every block would be the same: there are few to draw from.
    drawn = jnp.float32 if point.pass_name in ("fp8", "prepare") else point.dtype
    return tuple(
        jax.random.normal(key, (point.batch, length, n, d), drawn).astype(point.dtype)
        for key, length, n, d in zip(keys, lengths, heads, dims, strict=False)
    )


def _forward(point: Point, name: str, inputs: tuple[jax.Array, ...]) -> Call:
    attention = CONTENDERS[name](point)
    query, key, value = inputs
    query = query.astype(jnp.float32) * attention.query_scale
    args = tuple(x.astype(attention.dtype or point.dtype) for x in (query, key, value))
    return Call(jax.jit(attention.fn), (*args, *attention.masks))


def _backward(point: Point, name: str, inputs: tuple[jax.Array, ...]) -> Call:
    """The vjp outside of jit leaves its residuals behind, so the call is the backward alone."""
    attention = CONTENDERS[name](point)
    *qkv, dout = inputs
    moving = attention.masks if attention.derivative else ()
    fixed = attention.masks[len(moving) :]
    _, pullback = jax.vjp(lambda *x: attention.fn(*x, *fixed), *qkv, *moving)
    return Call(jax.jit(lambda pullback, dout: pullback(dout)), (pullback, dout))


def _both(point: Point, name: str, inputs: tuple[jax.Array, ...]) -> Call:
    attention = CONTENDERS[name](point)

    def out_and_grads(query, key, value, dout):
        qkv = query, key, value
        out, pullback = jax.vjp(lambda *qkv: attention.fn(*qkv, *attention.masks), *qkv)
        return out, *pullback(dout)

    return Call(jax.jit(out_and_grads), inputs)


def _fp8_forward(point: Point, name: str, inputs: tuple[jax.Array, ...]) -> Call:
    if name in fp8.CONTENDERS:
        return fp8.CONTENDERS[name](point, inputs)
    return _forward(point, name, fp8.dequantized(inputs, point.dtype))


class Pass(NamedTuple):
    """One more pass is one more of these, and its FLOPs in Point.flops."""

    inputs: Callable[[Point], tuple[jax.Array, ...]]
    call: Callable[[Point, str, tuple[jax.Array, ...]], Call]  # of a contender, on those inputs
    check: Callable[[Point, tuple[jax.Array, ...], Any], float]  # of its result


PASSES = {
    "fwd": Pass(_normal, _forward, check.check_forward),
    "bwd": Pass(_normal, _backward, check.check_backward),
    "fwd+bwd": Pass(
        _normal,
        _both,
        lambda point, inputs, results: check.check_backward(point, inputs, results[1:]),
    ),
    "fp8": Pass(lambda point: fp8.quantized(_normal(point)), _fp8_forward, fp8.check_forward),
    "prepare": Pass(_normal, fp8.preparation, fp8.check_preparation),
    "intervals": Pass(
        _segments,
        lambda point, name, ids: Call(_key_intervals(point, name), ids),
        check.check_intervals,
    ),
}
