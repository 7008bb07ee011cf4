"""Who runs a point, and how: each contender as a plain function of query, key and value."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jax_fa3

from . import check, fp8
from .points import Point
from .timing import Call


class Refused(Exception):
    """A contender does not take this point; the text says why."""


class Attention(NamedTuple):
    """fn(query, key, value, *masks) -> out, and what its inputs must look like."""

    fn: Callable[..., jax.Array]
    masks: tuple[jax.Array, ...] = ()
    dtype: str | None = None  # None: the point's
    query_scale: float = 1.0  # multiplied into query beforehand, where a contender knows no scale


def _window(point: Point) -> tuple[int, int] | None:
    return None if point.window is None else (point.window, 0)


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
            local_window_size=_window(point),
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


def _cudnn(point: Point) -> Attention:
    if point.documents:
        raise Refused("jax.nn has no packed documents")
    return Attention(
        partial(
            jax.nn.dot_product_attention,
            is_causal=point.is_causal,
            local_window_size=_window(point),
            implementation="cudnn",
        )
    )


def _pallas(point: Point) -> Attention:
    if point.documents or point.window is not None:
        raise Refused("no masks other than causal")
    if point.head_dim != point.head_dim_v:
        raise Refused("no value head dim of its own")
    if point.pass_name != "fwd":
        raise Refused("its backward has no causal mask")
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    # Two warpgroups of 64 rows; the widest key block whose scores, probabilities and output stay in
    # their registers, and whose two stages fit into shared memory.
    config = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=128 if point.head_dim <= 128 else 64,
        max_concurrent_steps=2,
        causal=point.is_causal,
    )

    def attention(query, key, value) -> Any:
        return attention_mgpu.attention(query, key, value, config=config)

    return Attention(attention, dtype="float16", query_scale=point.head_dim**-0.5)


def _flash_attn3_jax(point: Point) -> Attention:
    if (point.head_dim, point.head_dim_v) != (128, 128):
        raise Refused("head dim 128 only")
    if point.documents:
        raise Refused("packed documents need another layout")
    try:
        from flash_attn3_jax import flash_mha  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Refused(f"not installed ({error})") from error
    window = _window(point) or (-1, -1)
    return Attention(partial(flash_mha, is_causal=point.is_causal, window_size=window))


CONTENDERS: dict[str, Callable[[Point], Attention]] = {
    "fa3": _fa3,
    "fa3 arrays": _fa3_arrays,  # the same mask, said by key_begin and key_end
    "fa3 full": _fa3,  # the same shapes with no mask: see `problem`
    "fa3 deterministic": partial(_fa3, deterministic_backward=True),
    "cudnn": _cudnn,
    "pallas": _pallas,
    "flash-attn3-jax": _flash_attn3_jax,
}


def problem(point: Point, name: str) -> Point:
    """What the contender computes: the point's problem, or the same one without its mask."""
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
            query_segment_ids=query_segment_ids,
            key_value_segment_ids=key_value_segment_ids,
            implementation=implementation,
        )

    return convert


def _normal(point: Point) -> tuple[jax.Array, ...]:
    """query, key, value and, for the passes that take it, the cotangent of out."""
    heads = (point.num_heads_q, point.num_heads_k, point.num_heads_k, point.num_heads_q)
    dims = (point.head_dim, point.head_dim, point.head_dim_v, point.head_dim_v)
    keys = jax.random.split(jax.random.key(0), 4 if "bwd" in point.pass_name else 3)
    # Drawn in bf16, the largest number of every block would be the same: there are few to draw from.
    drawn = jnp.float32 if point.pass_name in ("fp8", "prepare") else point.dtype
    return tuple(
        jax.random.normal(key, (point.batch, point.seqlen, n, d), drawn).astype(point.dtype)
        for key, n, d in zip(keys, heads, dims, strict=False)
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
    _, pullback = jax.vjp(lambda *qkv: attention.fn(*qkv, *attention.masks), *qkv)
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
