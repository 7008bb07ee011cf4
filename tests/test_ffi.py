"""The custom calls as they are lowered, and registration. What the handlers do: test_gpu_*."""

import dataclasses
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from lowering import lower, operations, targets

from jax_fa3 import _ffi
from jax_fa3._operands import Operands, Rows
from jax_fa3._problem import Config, Masks

B, T, S, N, K, H, V = 2, 16, 24, 4, 2, 192, 128
CONFIG = Config(0.5, (None, None), None, False)
needs_kernels = pytest.mark.skipif(
    _ffi._C is None or not _ffi._C.kernels(), reason="no kernels in this install"
)


def struct(*shape: Any, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


OPERANDS = struct(B, T, N, H), struct(B, S, K, H), struct(B, S, K, V)


def attributes(config: Config) -> dict[str, str]:
    text = lower(lambda q, k, v: _ffi.fwd(config, Operands(q, k, v), Masks()), *OPERANDS)
    found = re.search(r"mhlo.backend_config = \{(.*?)\}", text)
    assert found is not None
    return dict(item.split(" = ") for item in found[1].split(", "))


def test_fwd_operands_and_results():
    masks = Masks(query_offset=struct(1, dtype=jnp.int32), key_end=struct(B, T, dtype=jnp.int32))
    text = lower(lambda *x: _ffi.fwd(CONFIG, Operands(*x[:3]), x[3]), *OPERANDS, masks)
    assert targets(text) == ["jax_fa3.fwd.v1"]
    assert operations(text) == {"custom_call", "broadcast_in_dim"}  # the latter: of no elements
    shapes = (
        "2x16x4x192xbf16, 2x24x2x192xbf16, 2x24x2x128xbf16, 1xi32, 0xi32, 0xi32, 0xi32, 2x16xi32, "
        "0xf32, 0xf32, 0xf32, 0xbf16, 0xui32, 0xui32, 0xui32, 0xf32, 0xf32"
    )
    operands = ", ".join(f"tensor<{shape}>" for shape in shapes.split(", "))
    # What the log-sum-exp lost, which is not wanted here; workspace: a counter, sums of many keys.
    results = "tensor<2x16x4x128xbf16>, tensor<2x4x16xf32>, tensor<0xf32>"
    assert f": ({operands}) -> ({results}, tensor<1xi32>, tensor<0xf32>)" in text
    layouts = re.findall(r"dense<\[?([\d, ]+)\]?> : tensor<(\d)xindex>", text)
    row_major = {"1": "0", "2": "1, 0", "3": "2, 1, 0", "4": "3, 2, 1, 0"}
    assert [rank for _, rank in layouts] == list("4441111211111111143111")
    assert all(layout == row_major[rank] for layout, rank in layouts)


def test_fwd_for_the_gradient():
    """One more result, fp32 [B, N, T]."""

    def forward(q, k, v):
        return _ffi.fwd(CONFIG, Operands(q, k, v), Masks(), with_lse_low=True)

    text = lower(forward, *OPERANDS)
    assert "-> (tensor<2x16x4x128xbf16>, tensor<2x4x16xf32>, tensor<2x4x16xf32>, tensor<1x" in text
    assert [x.shape for x in jax.eval_shape(forward, *OPERANDS)] == [(B, T, N, V), *[(B, N, T)] * 2]


@needs_kernels
def test_fwd_of_many_keys():
    """More of them than are summed at a time; and where their number is not known."""

    def forward(q, k, v):
        return _ffi.fwd(CONFIG, Operands(q, k, v), Masks())

    assert _ffi._C is not None
    for length in (2**18, 2**18 + 1):
        kv = struct(B, length, K, H), struct(B, length, K, V)
        text = lower(forward, OPERANDS[0], *kv)
        assert f", tensor<1xi32>, tensor<{_ffi._C.fwd_long_sums(length, H, V)}xf32>)" in text
    (length,) = jax.export.symbolic_shape("s")
    kv = struct(B, length, K, H), struct(B, length, K, V)
    text = lower(forward, OPERANDS[0], *kv)
    assert ", tensor<1xi32>, tensor<0xf32>)" in text


def test_fwd_attributes():
    assert attributes(CONFIG) == {
        "scale": "5.000000e-01 : f32",
        "soft_cap": "0.000000e+00 : f32",
        "window_left": f"{2**62} : i64",
        "window_right": f"{2**62} : i64",
        "num_heads_q": "4 : i64",
        "num_heads_k": "2 : i64",
        "first_head_q": "0 : i64",
        "first_head_k": "0 : i64",
        "first_head_v": "0 : i64",
        "head_dim_v": "128 : i64",
        "first_column_v": "0 : i64",
        "dropout": "0 : i64",
    }
    found = attributes(Config(0.5, (7, -3), 30.0, False))
    assert (found["window_left"], found["window_right"]) == ("7 : i64", "-3 : i64")
    assert found["soft_cap"] == "3.000000e+01 : f32"
    found = attributes(Config(0.5, (10**30, -(10**30)), None, False))
    assert (found["window_left"], found["window_right"]) == (f"{2**61} : i64", f"{-(2**61)} : i64")


def test_fwd_of_parts_of_the_keys():
    """Results in fp32 are joined with those before where these are; the last are in query's dtype."""

    def forward(q, k, v):
        before: Any = None
        for partial in (True, True, False):
            config = dataclasses.replace(CONFIG, partial=partial)
            before = _ffi.fwd(config, Operands(q, k, v), Masks(), before)
        return before

    text = lower(forward, *OPERANDS)
    calls = re.findall(r"custom_call @jax_fa3.fwd.v1\((.*)\) {.*: \((.*)\) -> \((.*)\)\n", text)
    out, lse, absent = "tensor<2x16x4x128xf32>", "tensor<2x4x16xf32>", "tensor<0xf32>"
    befores = [operands.split(", ")[8:10] for _, operands, _ in calls]
    assert befores == [[absent] * 2, [out, lse], [out, lse]]
    results = [results.split(", ")[:3] for *_, results in calls]
    assert results == [[out, lse, absent]] * 2 + [["tensor<2x16x4x128xbf16>", lse, absent]]
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", text)
    assert aliases == [("0", "8"), ("1", "9"), ("1", "9")]


def test_key_and_value_side_by_side():
    """One array stands for both, without a copy; for the backward in words, with more behind them."""
    q, _, _ = OPERANDS
    together, words = struct(B, S, K, H + V), struct(B, S, K, 500, dtype=jnp.uint32)
    rows = struct(B, N, T, dtype=jnp.float32), struct(B, T, N, V)

    def both(q, together, words, lse, dout):
        forward = _ffi.fwd(CONFIG, Operands(q, together), Masks())
        rows = Rows(None, lse, dout, lse)
        return forward, _ffi.bwd(CONFIG, Operands(q, words), Masks(), rows)

    text = lower(both, q, together, words, *rows)
    assert operations(text) == {"custom_call", "broadcast_in_dim"}
    assert text.count(f"first_column_v = {H} : i64") == text.count(f"head_dim_v = {V} : i64") == 2
    assert "(%arg0, %arg1, %arg1, " in text and "(%arg0, %arg2, %arg2, " in text
    assert "-> (tensor<2x16x4x128xbf16>, " in text
    grads = "tensor<2x16x4x192xbf16>, tensor<2x24x2x192xbf16>, tensor<2x24x2x128xbf16>"
    assert f"-> ({grads}, " in text


def test_segment_intervals_operands_and_results():
    ids = struct(B, T, dtype=jnp.int32), struct(B, S, dtype=jnp.int32)
    text = lower(_ffi.segment_intervals, *ids)
    assert targets(text) == ["jax_fa3.segment_intervals.v1"]
    assert operations(text) == {"custom_call"}
    assert ": (tensor<2x16xi32>, tensor<2x24xi32>) -> (tensor<2x16xi32>, tensor<2x16xi32>)" in text


def test_api_versions():
    assert _ffi.runtime_api_version() >= (0, 3)
    _ffi.check_api_version((0, 3), (0, 3))
    _ffi.check_api_version((0, 3), (0, 5))
    for built in [(0, 4), (1, 0)]:
        message = rf"built for XLA's FFI {built[0]}\.{built[1]}, but this jaxlib speaks 0\.3"
        with pytest.raises(ImportError, match=message):
            _ffi.check_api_version(built, (0, 3))


def test_register(monkeypatch):
    registered = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *x, **k: registered.append((x, k)))
    module = types.SimpleNamespace(ffi_api_version=lambda: (0, 3), ffi_targets=lambda: {"a.v1": 5})
    monkeypatch.setattr(_ffi, "_C", module)
    _ffi.register()
    assert registered == [(("a.v1", 5), {"platform": "CUDA", "api_version": 1})]

    module.ffi_api_version = lambda: (0, 99)
    with pytest.raises(ImportError, match=r"FFI 0\.99"):
        _ffi.register()
    monkeypatch.setattr(_ffi, "_C", None)
    _ffi.register()
    assert len(registered) == 1


def test_load(monkeypatch):
    def fail(error):
        def import_module(name):
            raise error

        monkeypatch.setattr(_ffi.importlib, "import_module", import_module)

    fail(ModuleNotFoundError("No module named 'jax_fa3._C'", name="jax_fa3._C"))
    assert _ffi._load() is None  # a Python-only install
    for error in (ImportError("undefined symbol"), ModuleNotFoundError("x", name="x")):
        fail(error)
        with pytest.raises(ImportError):
            _ffi._load()
