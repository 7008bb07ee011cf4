"""Custom calls as the library makes them, of every target."""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax.numpy as jnp
from call_operands import (
    B,
    H,
    K,
    N,
    S,
    Struct,
    T,
    V,
    fp8_operands,
    masks_of,
    operands_of,
    rows_of,
)
from decode_calls import decode_calls
from kernel_calls import BACKWARD, FORWARD, backward_of_three, fp8_forward, quantized
from recorded_calls import Call, recorded

from jax_fa3 import _ffi, _mask_bits, _plan, _tangent
from jax_fa3._kernel_sizes import bwd_tile
from jax_fa3._operands import Operands, Rows
from jax_fa3._problem import Config, Masks
from jax_fa3.fp8 import _ffi as _fp8


def right_calls() -> dict[str, Call]:
    """At least one of every target; two with each way to leave something out."""
    operands = operands_of()
    q: Any = operands[0]
    every = Config(0.5, (7, 3), 30.0, True)
    plain = Config(0.5, (None, None), None, False)
    partial = dataclasses.replace(plain, partial=True)
    ordered = dataclasses.replace(plain, deterministic_backward=True)
    dropping, words_of_heads = dataclasses.replace(every, dropout=9), Struct((B, N, 2), jnp.uint32)
    qkv = Struct((B, T, N + 2 * K, H), q.dtype)
    together = Struct((B, S, K, H + V), q.dtype)
    words = Struct((B, S, K, (H + V) // 2), jnp.uint32)
    summed = _ffi.dq_sum_of(q, N, V)
    before = Struct((B, T, N, V), jnp.float32), Struct((B, N, T), jnp.float32)
    rows, packed_rows = rows_of(), rows_of(T, N, H)
    low = rows[1]
    half, half_rows = operands_of(dtype=jnp.float16), rows_of(dtype=jnp.float16)
    ids = Struct((B, T), jnp.int32), Struct((B, S), jnp.int32)
    lengths, masks = Struct((B,), jnp.int32), masks_of()

    def packed_forward(config: Config) -> Any:
        return lambda qkv, masks: FORWARD(config, qkv, masks, packed=(N, K))

    def packed_backward(qkv: Any, masks: Masks, *rows: Any) -> Any:
        return BACKWARD(every, Operands(qkv, packed=(N, K)), masks, *rows)

    def backward(config: Config) -> Any:
        return lambda *x: backward_of_three(config, *x)

    def with_sinks(config: Config) -> Any:
        return lambda *x: FORWARD(config, *x[:3], Masks(), sinks=x[3])

    def forward_with(**others: Struct) -> Call:
        def call(x: Any, *y: Any) -> Any:
            return FORWARD(plain, *y, Masks(), **dict.fromkeys(others, x))

        return recorded(call, *others.values(), *operands)

    def joined(config: Config) -> Any:
        return lambda *x: FORWARD(config, *x[:3], Masks(), before=x[3:])

    def continued(*x: Any) -> Any:
        options: Any = {"summed_dq": x[-1], "finish_dq": False}
        return backward_of_three(partial, *x[:3], Masks(), *x[3:-1], **options)

    def tangent(config: Config) -> Any:
        def call(q: Any, k: Any, v: Any, masks: Masks, out: Any, lse: Any, sinks: Any) -> Any:
            low = None if sinks is None else lse
            rows: Any = Rows(out, lse, None, None, low)  # pyright: ignore[reportArgumentType]
            operands = Operands(q, k, v, sinks=sinks)
            return _tangent.custom_call_of(config, operands, masks, rows, Operands(q, k, v))

        return call

    def backward_with(config: Config = plain, **others: Struct) -> Call:
        def call(x: Any, *y: Any) -> Any:
            return backward_of_three(config, *y[:3], Masks(), *y[3:], **dict.fromkeys(others, x))

        return recorded(call, *others.values(), *operands, *rows)

    def of_words(q: Any, words: Any, *rows: Any) -> Any:
        return BACKWARD(partial, Operands(q, words), Masks(), None, *rows, finish_dq=False)

    return {
        "fwd": recorded(lambda *x: FORWARD(every, *x), *operands, masks),
        "fwd without masks": recorded(lambda *x: FORWARD(plain, *x, Masks()), *operands),
        "fwd for the gradient": recorded(
            lambda *x: FORWARD(plain, *x, Masks(), with_lse_low=True), *operands
        ),
        "fwd with sinks": recorded(with_sinks(plain), *operands, Struct((1, N), jnp.float32)),
        "fwd with sinks of each entry": recorded(
            with_sinks(every), *operands, Struct((B, N), jnp.float32)
        ),
        "fwd with bias": forward_with(bias=Struct((1, N, T, S), q.dtype)),
        "fwd with bias of each entry": forward_with(bias=Struct((B, 1, 1, S), jnp.float32)),
        "fwd with a mask": forward_with(mask=Struct((B, 1, T, S), bool)),
        "fwd with a mask of keys": forward_with(mask=Struct((1, N, 1, S), bool)),
        "fwd with slopes": forward_with(slopes=Struct((1, N), jnp.float32)),
        "fwd with a table": forward_with(table=Struct((1, N, T + S), jnp.float32)),
        "fwd with dropout": recorded(
            lambda x, *y: FORWARD(dropping, *y, dropout=x), words_of_heads, *operands, masks
        ),
        "fwd of many keys": with_long_sums(
            recorded(lambda *x: FORWARD(plain, *x, Masks()), *operands)
        ),
        "fwd in parts": in_parts(
            lambda *x: FORWARD(plain, *x, Masks(), with_lse_low=True), *operands
        ),
        "fwd packed": recorded(packed_forward(every), qkv, masks),
        "fwd side by side": recorded(lambda q, x: FORWARD(plain, q, x, Masks()), q, together),
        "fwd joined": recorded(joined(partial), *operands, *before),
        "fwd joined last": recorded(joined(plain), *operands, *before),
        "bwd": recorded(backward(every), *operands, masks, *rows),
        "bwd without masks": recorded(backward(plain), *operands, Masks(), *rows),
        "bwd with sinks": backward_with(sinks=Struct((1, N), jnp.float32)),
        "bwd with bias": backward_with(bias=Struct((1, N, T, S), q.dtype)),
        "bwd with a mask": backward_with(mask=Struct((1, N, T, S), bool)),
        "bwd with slopes": backward_with(slopes=Struct((1, N), jnp.float32)),
        "bwd with a table": backward_with(table=Struct((B, N, T + S), jnp.float32)),
        "bwd with a table, in order": backward_with(
            ordered, table=Struct((1, N, T + S), jnp.float32)
        ),
        "bwd with dropout": recorded(
            lambda x, *y: backward_of_three(dropping, *y[:3], Masks(), *y[3:], dropout=x),
            *(words_of_heads, *operands, *rows),
        ),
        "bwd in parts": in_parts(backward(plain), *operands, Masks(), *rows, low),
        "bwd of float16": recorded(backward(every), *half, masks, *half_rows, low),
        "bwd continued": recorded(continued, *operands, *rows, summed),
        "bwd of words": recorded(of_words, q, words, *rows[1:]),
        "bwd packed": recorded(packed_backward, qkv, masks, *packed_rows, low),
        "bwd packed with sinks": recorded(
            lambda s, x, *rows: BACKWARD(
                every, Operands(x, sinks=s, packed=(N, K)), Masks(), *rows
            ),
            *(Struct((1, N), jnp.float32), qkv, *packed_rows),
        ),
        "bwd packed in parts": in_parts(packed_backward, qkv, masks, *packed_rows, low),
        "fp8": recorded(
            fp8_forward(every), *fp8_operands(T, S, H), masks, Struct((B, K, H), jnp.float32)
        ),
        "fp8 with sinks": recorded(
            fp8_forward(plain), *fp8_operands(T, S, 64), Masks(), None, Struct((1, N), jnp.float32)
        ),
        "fp8 without masks": recorded(fp8_forward(plain), *fp8_operands(T, S, 64), Masks()),
        "fp8 of transposed value": recorded(
            lambda x, *y: fp8_forward(plain)((*y[0][:2], _fp8.Transposed(x)), *y[1:]),
            Struct((B, K, 64, 2 * _fp8.BLOCK), jnp.float8_e4m3fn),
            *(*fp8_operands(T, _fp8.BLOCK + 1, 64), Masks()),  # one key less is a block less
        ),
        "quantize": recorded(
            lambda x, signs, lengths, mean: quantized(x, False, signs, lengths, None, mean),
            *(q, Struct((1, H), jnp.float32), lengths, Struct((B, N, H), jnp.float32)),
        ),
        "quantize alone": recorded(lambda x: quantized(x), q),
        "quantize transposed": recorded(
            lambda x: quantized(x, True)[0], operands_of(length=_fp8.BLOCK + 1)[0]
        ),
        "jvp": recorded(tangent(every), *operands, masks, *rows[:2], Struct((1, N), jnp.float32)),
        "jvp without masks": recorded(tangent(plain), *operands, Masks(), *rows[:2], None),
        "segment_intervals": recorded(_ffi.segment_intervals, *ids),
        "mask_bits": recorded(lambda x: _mask_bits.for_kernels(x, S), Struct((B, 1, T, S), bool)),
        "mask_bits of the backward": recorded(
            lambda x: _mask_bits.for_kernels(x, S, bwd_tile(H)), Struct((B, N, T, 1), bool)
        ),
        "mask_bits of intervals": recorded(
            lambda x: _mask_bits.for_kernels(x, S, bwd_tile(64)), Struct((B, 1, T, 6), jnp.int32)
        ),
        **decode_calls(),
    }


def in_parts(function: Callable[..., Any], *operands: Any) -> Call:
    """As if there were so few keys that three CTAs should share the rows of each block; and so few rows
    that they should share the keys."""
    with (
        mock.patch.object(_plan, "splits", lambda *_: 3),
        mock.patch.object(_plan, "key_splits", lambda *_: 3),
    ):
        return recorded(function, *operands)


def with_long_sums(call: Call) -> Call:
    """With workspace for sums of many keys, which are not there, of one CTA: the least there may be.
    The library makes as much for every SM of a GPU."""
    assert _ffi._C is not None
    numbers = _ffi._C.fwd_long_sums(2**31 - 1, H, V) // 132
    return dataclasses.replace(call, results=(*call.results[:-1], Struct((numbers,), jnp.float32)))


def without_heads() -> dict[str, Call]:
    """Right calls, too."""
    config = Config(0.5, (None, None), None, False)
    operands, rows = operands_of(heads=0), rows_of(heads=0)

    def packed_backward(qkv: Any, *rows: Any) -> Any:
        return BACKWARD(config, Operands(qkv, packed=(0, K)), Masks(), *rows)

    qkv = Struct((B, T, 2 * K, H), jnp.bfloat16)
    return {
        "fwd": recorded(lambda *x: FORWARD(config, *x, Masks()), *operands),
        "bwd": recorded(lambda *x: backward_of_three(config, *x), *operands, Masks(), *rows),
        "bwd packed": recorded(packed_backward, qkv, *rows_of(heads=0, columns=H)),
        "fp8": recorded(fp8_forward(config), *fp8_operands(T, S, H, 0), Masks()),
    }
