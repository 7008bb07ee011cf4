"""The custom calls: operands and results of each, in XLA's order. Twin of cpp/ffi_targets.h, which has
their shapes, too, and with which a test compares it.

Targets are versioned; once released, the table of a name never changes, or exported programs would
break.
"""

from __future__ import annotations

from ._target_rows import (
    ATTENDED,
    BWD_WORKSPACE,
    COTANGENTS,
    FLOAT8,
    FLOAT32,
    INT32,
    MASKS,
    PLACES,
    QKV,
    ROTARY,
    SCALES,
    SIXTEEN_BITS,
    SIXTEEN_BITS_OR_E4M3,
    SIXTEEN_BITS_OR_FLOAT32,
    SIXTEEN_BITS_OR_OTHER,
    TERMS,
    Row,
    Target,
)

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

TARGETS = {
    FWD: Target(
        operands=(
            *QKV,
            *MASKS,
            Row("out_before", FLOAT32, optional=True),
            Row("lse_before", FLOAT32, optional=True),
            *TERMS,
        ),
        results=(
            Row("out", SIXTEEN_BITS_OR_FLOAT32),
            Row("lse", FLOAT32),
            Row("lse_low", FLOAT32, optional=True),
            Row("tile_counter", INT32),
            Row("long_sums", FLOAT32, optional=True),
        ),
    ),
    BWD: Target(
        operands=(
            *QKV,
            *MASKS,
            *COTANGENTS,
            Row("summed_dq", FLOAT32, optional=True),
            *TERMS,
        ),
        results=(
            Row("dquery", SIXTEEN_BITS, optional=True),
            Row("dkey", SIXTEEN_BITS_OR_FLOAT32),
            Row("dvalue", SIXTEEN_BITS_OR_FLOAT32),
            *BWD_WORKSPACE,
        ),
    ),
    BWD_PACKED: Target(
        operands=(
            Row("qkv", SIXTEEN_BITS),
            *MASKS,
            *COTANGENTS,
            *TERMS,
        ),
        results=(Row("dqkv", SIXTEEN_BITS), *BWD_WORKSPACE),
    ),
    FWD_FP8: Target(
        operands=(
            Row("query", FLOAT8),
            Row("key", FLOAT8),
            Row("value", FLOAT8, optional=True),
            Row("query_scale", FLOAT32),
            Row("key_scale", FLOAT32),
            Row("value_scale", FLOAT32),
            Row("value_mean", FLOAT32, optional=True),
            *MASKS,
            Row("sinks", FLOAT32, optional=True),
            Row("value_transposed", FLOAT8, optional=True),
        ),
        results=(
            Row("out", SIXTEEN_BITS_OR_FLOAT32),
            Row("lse", FLOAT32),
            Row("counters", INT32),
            Row("transposed_value", ("uint8",)),
        ),
    ),
    QUANTIZE: Target(
        operands=(
            Row("x", SIXTEEN_BITS),
            Row("signs", FLOAT32, optional=True),
            Row("lengths", INT32, optional=True),
            Row("mean", FLOAT32, optional=True),
        ),
        results=(
            Row("quantized", FLOAT8, optional=True),
            Row("scales", FLOAT32),
            Row("transposed", FLOAT8, optional=True),
        ),
    ),
    SEGMENT_INTERVALS: Target(
        operands=(Row("query_segment_ids", INT32), Row("key_value_segment_ids", INT32)),
        results=(Row("key_begin", INT32), Row("key_end", INT32)),
    ),
    MASK_BITS: Target(
        operands=(Row("mask", ("bool",), optional=True), Row("intervals", INT32, optional=True)),
        results=(Row("bits", ("uint32",)), Row("blocks", ("uint32",))),
    ),
    DECODE: Target(
        operands=(
            Row("query", SIXTEEN_BITS),
            *ATTENDED,
        ),
        results=(
            Row("out", SIXTEEN_BITS),
            Row("lse", FLOAT32),
            Row("partials", FLOAT32),
            Row("arrivals", INT32),
        ),
    ),
    APPEND: Target(
        operands=(
            Row("key", SIXTEEN_BITS_OR_OTHER),
            Row("value", SIXTEEN_BITS_OR_OTHER),
            Row("key_cache", SIXTEEN_BITS_OR_OTHER),
            Row("value_cache", SIXTEEN_BITS_OR_OTHER, optional=True),
            *PLACES,
            *SCALES,
            Row("query", SIXTEEN_BITS, optional=True),
            *ROTARY,
        ),
        results=(
            Row("new_key_cache", SIXTEEN_BITS_OR_OTHER),
            Row("new_value_cache", SIXTEEN_BITS_OR_OTHER, optional=True),
            Row("rotated_query", SIXTEEN_BITS, optional=True),
        ),
    ),
    APPEND_AND_ATTEND: Target(
        operands=(
            Row("query", SIXTEEN_BITS),
            Row("key", SIXTEEN_BITS_OR_E4M3),
            Row("value", SIXTEEN_BITS_OR_E4M3),
            *ATTENDED,
            *ROTARY,
        ),
        results=(
            Row("out", SIXTEEN_BITS),
            Row("lse", FLOAT32),
            Row("new_key_cache", SIXTEEN_BITS_OR_E4M3),
            Row("new_value_cache", SIXTEEN_BITS_OR_E4M3, optional=True),
            Row("rotated_query", SIXTEEN_BITS, optional=True),
            Row("partials", FLOAT32),
            Row("arrivals", INT32),
        ),
    ),
    JVP: Target(
        operands=(
            Row("query", SIXTEEN_BITS),
            Row("key", SIXTEEN_BITS),
            Row("value", SIXTEEN_BITS),
            *MASKS,
            Row("query_dot", SIXTEEN_BITS),
            Row("key_dot", SIXTEEN_BITS),
            Row("value_dot", SIXTEEN_BITS),
            Row("out", SIXTEEN_BITS),
            Row("lse", FLOAT32),
            Row("lse_low", FLOAT32, optional=True),
            Row("sinks", FLOAT32, optional=True),
        ),
        results=(
            Row("out_dot", SIXTEEN_BITS),
            Row("lse_dot", FLOAT32),
            Row("tile_counter", INT32),
        ),
    ),
}
