"""The custom calls: operands and results of each, in XLA's order. Twin of cpp/ffi_targets.h, which has
their shapes, too, and with which a test compares it.

Targets are versioned; once released, the table of a name never changes, or exported programs would
break.
"""

from __future__ import annotations

from typing import NamedTuple

FWD = "jax_fa3.fwd.v1"
BWD = "jax_fa3.bwd.v1"
BWD_PACKED = "jax_fa3.bwd_packed.v1"
FWD_FP8 = "jax_fa3.fwd_fp8.v1"
QUANTIZE = "jax_fa3.quantize.v1"
SEGMENT_INTERVALS = "jax_fa3.segment_intervals.v1"
DECODE = "jax_fa3.decode.v1"
APPEND = "jax_fa3.append.v1"
APPEND_AND_ATTEND = "jax_fa3.append_and_attend.v1"
JVP = "jax_fa3.jvp.v1"
MASK_BITS = "jax_fa3.mask_bits.v1"


class Row(NamedTuple):
    """An operand or a result."""

    name: str
    dtypes: tuple[str, ...]
    optional: bool = False  # absent it has shape [0]


class Target(NamedTuple):
    operands: tuple[Row, ...]
    results: tuple[Row, ...]  # workspace last


_FLOAT32, _INT32 = ("float32",), ("int32",)
_FLOAT8 = ("float8_e4m3fn",)
_16_BITS = ("bfloat16", "float16")
_16_BITS_OR_WORDS = (*_16_BITS, "uint32")
_16_BITS_OR_E4M3 = (*_16_BITS, "float8_e4m3fn")
_16_BITS_OR_FLOAT32 = (*_16_BITS, "float32")
_16_BITS_OR_OTHER = (*_16_BITS, "float32", "float8_e4m3fn")

_MASKS = (
    Row("query_offset", _INT32, optional=True),
    Row("query_seq_lengths", _INT32, optional=True),
    Row("key_value_seq_lengths", _INT32, optional=True),
    Row("key_begin", _INT32, optional=True),
    Row("key_end", _INT32, optional=True),
)
_COTANGENTS = (
    Row("out", _16_BITS, optional=True),
    Row("lse", _FLOAT32),
    Row("dout", _16_BITS),
    Row("dlse", _FLOAT32),
    Row("lse_low", _FLOAT32, optional=True),
)
_BIAS = Row("bias", _16_BITS_OR_FLOAT32, optional=True)
_BITS = (
    Row("mask_bits", ("uint32",), optional=True),
    Row("mask_blocks", ("uint32",), optional=True),
)
_DROPOUT = Row("dropout", ("uint32",), optional=True)
_PLACES = (  # in a KV cache
    Row("lengths", _INT32),
    Row("page_table", _INT32, optional=True),
    Row("query_starts", _INT32, optional=True),
    Row("num_sequences", _INT32, optional=True),
)
_SCALES = (
    Row("key_scale", _FLOAT32, optional=True),
    Row("value_scale", _FLOAT32, optional=True),
)
_ROTARY = (
    Row("positions", _INT32, optional=True),
    Row("rotary_cos", _16_BITS_OR_FLOAT32, optional=True),
    Row("rotary_sin", _16_BITS_OR_FLOAT32, optional=True),
)
_SLOPES = Row("alibi_slopes", _FLOAT32, optional=True)
_BWD_WORKSPACE = (
    Row("row_stats", _FLOAT32),
    Row("row_intervals", _INT32),
    Row("query_blocks", _INT32),
    Row("dq_accum", _FLOAT32),
    Row("turns", _INT32, optional=True),
    Row("ranges", _INT32, optional=True),
    Row("dkv_parts", _FLOAT32, optional=True),
    Row("dsinks", _FLOAT32, optional=True),
    Row("dbias", _FLOAT32, optional=True),
    Row("dalibi", _FLOAT32, optional=True),
)

TARGETS = {
    FWD: Target(
        operands=(
            Row("query", _16_BITS),
            Row("key", _16_BITS_OR_WORDS),
            Row("value", _16_BITS_OR_WORDS),
            *_MASKS,
            Row("out_before", _FLOAT32, optional=True),
            Row("lse_before", _FLOAT32, optional=True),
            Row("sinks", _FLOAT32, optional=True),
            _BIAS,
            *_BITS,
            _DROPOUT,
            _SLOPES,
        ),
        results=(
            Row("out", _16_BITS_OR_FLOAT32),
            Row("lse", _FLOAT32),
            Row("lse_low", _FLOAT32, optional=True),
            Row("tile_counter", _INT32),
            Row("long_sums", _FLOAT32, optional=True),
        ),
    ),
    BWD: Target(
        operands=(
            Row("query", _16_BITS),
            Row("key", _16_BITS_OR_WORDS),
            Row("value", _16_BITS_OR_WORDS),
            *_MASKS,
            *_COTANGENTS,
            Row("summed_dq", _FLOAT32, optional=True),
            Row("sinks", _FLOAT32, optional=True),
            _BIAS,
            *_BITS,
            _DROPOUT,
            _SLOPES,
        ),
        results=(
            Row("dquery", _16_BITS, optional=True),
            Row("dkey", _16_BITS_OR_FLOAT32),
            Row("dvalue", _16_BITS_OR_FLOAT32),
            *_BWD_WORKSPACE,
        ),
    ),
    BWD_PACKED: Target(
        operands=(
            Row("qkv", _16_BITS),
            *_MASKS,
            *_COTANGENTS,
            Row("sinks", _FLOAT32, optional=True),
            _BIAS,
            *_BITS,
            _DROPOUT,
            _SLOPES,
        ),
        results=(Row("dqkv", _16_BITS), *_BWD_WORKSPACE),
    ),
    FWD_FP8: Target(
        operands=(
            Row("query", _FLOAT8),
            Row("key", _FLOAT8),
            Row("value", _FLOAT8),
            Row("query_scale", _FLOAT32),
            Row("key_scale", _FLOAT32),
            Row("value_scale", _FLOAT32),
            Row("value_mean", _FLOAT32, optional=True),
            *_MASKS,
            Row("sinks", _FLOAT32, optional=True),
        ),
        results=(
            Row("out", _16_BITS_OR_FLOAT32),
            Row("lse", _FLOAT32),
            Row("counters", _INT32),
            Row("transposed_value", ("uint8",)),
        ),
    ),
    QUANTIZE: Target(
        operands=(
            Row("x", _16_BITS),
            Row("signs", _FLOAT32, optional=True),
            Row("lengths", _INT32, optional=True),
            Row("mean", _FLOAT32, optional=True),
        ),
        results=(Row("quantized", _FLOAT8), Row("scales", _FLOAT32)),
    ),
    SEGMENT_INTERVALS: Target(
        operands=(Row("query_segment_ids", _INT32), Row("key_value_segment_ids", _INT32)),
        results=(Row("key_begin", _INT32), Row("key_end", _INT32)),
    ),
    MASK_BITS: Target(
        operands=(Row("mask", ("bool",), optional=True), Row("intervals", _INT32, optional=True)),
        results=(Row("bits", ("uint32",)), Row("blocks", ("uint32",))),
    ),
    DECODE: Target(
        operands=(
            Row("query", _16_BITS),
            Row("key_cache", _16_BITS_OR_E4M3),
            Row("value_cache", _16_BITS_OR_E4M3, optional=True),
            *_PLACES,
            Row("key_begin", _INT32, optional=True),
            Row("sinks", _FLOAT32, optional=True),
            *_SCALES,
        ),
        results=(
            Row("out", _16_BITS),
            Row("lse", _FLOAT32),
            Row("partials", _FLOAT32),
            Row("arrivals", _INT32),
        ),
    ),
    APPEND: Target(
        operands=(
            Row("key", _16_BITS_OR_OTHER),
            Row("value", _16_BITS_OR_OTHER),
            Row("key_cache", _16_BITS_OR_OTHER),
            Row("value_cache", _16_BITS_OR_OTHER, optional=True),
            *_PLACES,
            *_SCALES,
            Row("query", _16_BITS, optional=True),
            *_ROTARY,
        ),
        results=(
            Row("new_key_cache", _16_BITS_OR_OTHER),
            Row("new_value_cache", _16_BITS_OR_OTHER, optional=True),
            Row("rotated_query", _16_BITS, optional=True),
        ),
    ),
    APPEND_AND_ATTEND: Target(
        operands=(
            Row("query", _16_BITS),
            Row("key", _16_BITS_OR_E4M3),
            Row("value", _16_BITS_OR_E4M3),
            Row("key_cache", _16_BITS_OR_E4M3),
            Row("value_cache", _16_BITS_OR_E4M3, optional=True),
            *_PLACES,
            Row("key_begin", _INT32, optional=True),
            Row("sinks", _FLOAT32, optional=True),
            *_SCALES,
            *_ROTARY,
        ),
        results=(
            Row("out", _16_BITS),
            Row("lse", _FLOAT32),
            Row("new_key_cache", _16_BITS_OR_E4M3),
            Row("new_value_cache", _16_BITS_OR_E4M3, optional=True),
            Row("rotated_query", _16_BITS, optional=True),
            Row("partials", _FLOAT32),
            Row("arrivals", _INT32),
        ),
    ),
    JVP: Target(
        operands=(
            Row("query", _16_BITS),
            Row("key", _16_BITS),
            Row("value", _16_BITS),
            *_MASKS,
            Row("query_dot", _16_BITS),
            Row("key_dot", _16_BITS),
            Row("value_dot", _16_BITS),
            Row("out", _16_BITS),
            Row("lse", _FLOAT32),
            Row("lse_low", _FLOAT32, optional=True),
            Row("sinks", _FLOAT32, optional=True),
        ),
        results=(
            Row("out_dot", _16_BITS),
            Row("lse_dot", _FLOAT32),
            Row("tile_counter", _INT32),
        ),
    ),
}
