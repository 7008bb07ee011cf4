"""Operands and results of the custom calls (_targets.py), and those that several calls have."""

from __future__ import annotations

from typing import NamedTuple

from ._operands import PER_HEAD


class Row(NamedTuple):
    """An operand or a result."""

    name: str
    dtypes: tuple[str, ...]
    optional: bool = False  # absent it has shape [0]


class Target(NamedTuple):
    operands: tuple[Row, ...]
    results: tuple[Row, ...]  # workspace last


FLOAT32, INT32 = ("float32",), ("int32",)
FLOAT8 = ("float8_e4m3fn",)
SIXTEEN_BITS = ("bfloat16", "float16")
SIXTEEN_BITS_OR_WORDS = (*SIXTEEN_BITS, "uint32")
SIXTEEN_BITS_OR_E4M3 = (*SIXTEEN_BITS, "float8_e4m3fn")
SIXTEEN_BITS_OR_FLOAT32 = (*SIXTEEN_BITS, "float32")
SIXTEEN_BITS_OR_OTHER = (*SIXTEEN_BITS, "float32", "float8_e4m3fn")

QKV = (
    Row("query", SIXTEEN_BITS),
    Row("key", SIXTEEN_BITS_OR_WORDS),
    Row("value", SIXTEEN_BITS_OR_WORDS),
)
MASKS = (
    Row("query_offset", INT32, optional=True),
    Row("query_seq_lengths", INT32, optional=True),
    Row("key_value_seq_lengths", INT32, optional=True),
    Row("key_begin", INT32, optional=True),
    Row("key_end", INT32, optional=True),
)
COTANGENTS = (
    Row("out", SIXTEEN_BITS, optional=True),
    Row("lse", FLOAT32),
    Row("dout", SIXTEEN_BITS),
    Row("dlse", FLOAT32, optional=True),
    Row("lse_low", FLOAT32, optional=True),
)
TERMS = (  # of the scores, and what else hides or drops some of them
    Row("bias", SIXTEEN_BITS_OR_FLOAT32, optional=True),
    Row("mask_bits", ("uint32",), optional=True),
    Row("mask_blocks", ("uint32",), optional=True),
    Row("dropout", ("uint32",), optional=True),
    *(Row(name, FLOAT32, optional=True) for name in PER_HEAD),
    Row("relative_bias", FLOAT32, optional=True),
)
BWD_WORKSPACE = (
    Row("row_stats", FLOAT32),
    Row("row_intervals", INT32),
    Row("query_blocks", INT32),
    Row("dq_accum", FLOAT32),
    Row("turns", INT32, optional=True),
    Row("ranges", INT32, optional=True),
    Row("dkv_parts", FLOAT32, optional=True),
    Row("dsinks", FLOAT32, optional=True),
    Row("dbias", FLOAT32, optional=True),
    Row("dalibi", FLOAT32, optional=True),
    Row("drelative", FLOAT32, optional=True),
)
PLACES = (  # in a KV cache
    Row("lengths", INT32),
    Row("page_table", INT32, optional=True),
    Row("query_starts", INT32, optional=True),
    Row("num_sequences", INT32, optional=True),
)
SCALES = (
    Row("key_scale", FLOAT32, optional=True),
    Row("value_scale", FLOAT32, optional=True),
)
ATTENDED = (  # what attention to a cache reads
    Row("key_cache", SIXTEEN_BITS_OR_E4M3),
    Row("value_cache", SIXTEEN_BITS_OR_E4M3, optional=True),
    *PLACES,
    Row("key_begin", INT32, optional=True),
    Row("sinks", FLOAT32, optional=True),
    *SCALES,
)
ROTARY = (
    Row("positions", INT32, optional=True),
    Row("rotary_cos", SIXTEEN_BITS_OR_FLOAT32, optional=True),
    Row("rotary_sin", SIXTEEN_BITS_OR_FLOAT32, optional=True),
)
