"""The tables of the custom calls' operands and results; calls by name."""

import jax
import jax.numpy as jnp
import pytest
from lowering import lower

from jax_fa3 import _ffi
from jax_fa3._custom_call import custom_call
from jax_fa3._targets import QUANTIZE, SEGMENT_INTERVALS, TARGETS

IDS = {"query_segment_ids": jnp.zeros((2, 3)), "key_value_segment_ids": jnp.zeros((2, 5))}
INTERVALS = {name: jax.ShapeDtypeStruct((2, 3), jnp.int32) for name in ("key_begin", "key_end")}


@pytest.mark.skipif(_ffi._C is None, reason="Python-only install")
def test_the_compiled_module_has_the_same():
    """In the same order, of the same dtypes, and it may do without the same."""
    assert _ffi._C is not None
    found = {
        name: tuple(
            [(name, tuple(dtypes), optional) for name, dtypes, optional in rows] for rows in table
        )
        for name, table in _ffi._C.ffi_arrays().items()
    }
    assert found == {name: tuple(map(list, table)) for name, table in TARGETS.items()}
    assert _ffi._C.ffi_targets().keys() == TARGETS.keys()


@pytest.mark.parametrize("table", TARGETS.values(), ids=TARGETS)
def test_names_are_said_once(table):
    for rows in table:
        assert len({row.name for row in rows}) == len(rows)


def test_any_order():
    """The call is made in the table's."""

    def call(q, k):
        operands = {"key_value_segment_ids": k, "query_segment_ids": q}
        results = {name: INTERVALS[name] for name in ("key_end", "key_begin")}
        found = custom_call(SEGMENT_INTERVALS, results, {}, **operands)
        return found["key_end"]

    text = lower(call, *(x.astype(jnp.int32) for x in IDS.values()))
    assert "(%arg0, %arg1)" in text and "return %0#1" in text


def test_what_is_left_out_has_no_elements():
    x = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.float16)
    results = {
        "quantized": jax.ShapeDtypeStruct(x.shape, jnp.float8_e4m3fn),
        "scales": jax.ShapeDtypeStruct((2, 1, 4), jnp.float32),
    }
    for absent in ({}, {"signs": None}, {"signs": None, "lengths": None}):
        text = lower(lambda x, absent=absent: custom_call(QUANTIZE, results, {}, x=x, **absent), x)
        assert "(tensor<2x128x4x64xf16>, tensor<0xf32>, tensor<0xi32>, tensor<0xf32>)" in text


@pytest.mark.parametrize(
    ("operands", "results", "message"),
    [
        ({"query_segment_ids": IDS["query_segment_ids"]}, INTERVALS, r"operands: got \['query_se"),
        (IDS | {"key_begin": IDS["query_segment_ids"]}, INTERVALS, r"operands: got \['key_begin'"),
        (IDS | {"key_value_segment_ids": None}, INTERVALS, "operands: got"),
        (IDS, INTERVALS | {"key_end": None}, "results: got"),
        (IDS, INTERVALS | {"end": INTERVALS["key_end"]}, r"results: got \['end', 'key_begin'"),
        (IDS, {"key_begin": INTERVALS["key_begin"]}, "results: got"),
    ],
)
def test_wrong_names(operands, results, message):
    with pytest.raises(TypeError, match=f"jax_fa3.segment_intervals.v1: {message}"):
        custom_call(SEGMENT_INTERVALS, results, {}, **operands)
