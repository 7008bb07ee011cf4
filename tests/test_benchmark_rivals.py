"""How the rivals are called: what dew-flash-attn is given, by a stand-in for it, and who refuses what."""

import dataclasses
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind an installed jax_fa3

from benchmarks import check, contenders, rivals, run
from benchmarks.points import Point, point

NAMES = {"contenders": ("dew",), "baseline": "dew", "heads": (4, 2), "batch": 2}
PACKED = {"documents": (100, 30, 62), "is_causal": True}
CALLS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 20},
    "packed": PACKED,
    "packed window": {**PACKED, "window": 20},
    "cross": {"seqlen_k": 77},
    "fp16": {"is_causal": True, "dtype": "float16"},
}


def small(pass_name: str = "fwd", **changes) -> Point:
    return point("paper", 64, 192, pass_name=pass_name, **NAMES, **changes)


def _masked(query, key, value, visible):
    dtype, group = query.dtype, query.shape[-2] // key.shape[-2]
    key, value = (jnp.repeat(x, group, axis=-2) for x in (key, value))
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    scores = jnp.einsum("...tnh,...snh->...nts", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("...nts,...snh->...tnh", weights, value).astype(dtype)


def _visible(rows, keys, is_causal, window_size):
    """Aligned to the last row and key; -1 bounds no side."""
    place = jnp.arange(rows)[:, None] + keys - rows
    key = jnp.arange(keys)[None]
    left, right = window_size
    right = 0 if is_causal else right
    return ((key >= place - left) | (left < 0)) & ((key <= place + right) | (right < 0))


@pytest.fixture
def dew(monkeypatch):
    """The signatures and meanings of the package's two functions, in plain JAX; the calls' options."""
    seen = []

    def flash_mha(query, key, value, softmax_scale=None, is_causal=False, window_size=(-1, -1)):
        assert query.ndim == 4 and query.shape[-1] == value.shape[-1]
        seen.append((is_causal, window_size))
        visible = _visible(query.shape[1], key.shape[1], is_causal, window_size)
        return _masked(query, key, value, visible)

    def flash_mha_varlen(
        query, key, value, cu_seqlens, max_seqlen, is_causal=False, window_size=(-1, -1)
    ):
        assert query.ndim == 3 and cu_seqlens.dtype == jnp.int32 and max_seqlen == 100
        seen.append((is_causal, window_size))
        ids = jnp.searchsorted(cu_seqlens, jnp.arange(len(query)), side="right")
        visible = _visible(len(query), len(query), is_causal, window_size)
        return _masked(query, key, value, visible & (ids[:, None] == ids))

    package = types.SimpleNamespace(flash_mha=flash_mha, flash_mha_varlen=flash_mha_varlen)
    monkeypatch.setitem(sys.modules, "dew_flash_attn", package)
    return seen


@pytest.mark.parametrize("mask", CALLS)
@pytest.mark.parametrize("pass_name", ["fwd", "bwd", "fwd+bwd"])
def test_dew_computes_the_point(mask, pass_name, dew, monkeypatch):
    """Outputs and gradients pass the benchmark's check, whose query rows are split here."""
    monkeypatch.setattr(check, "GRADIENT_ROWS", 64)
    p = small(pass_name, **CALLS[mask])
    _, records = run.prepare(p)
    assert 0 < records["dew"]["error_share"] < 1
    left = (20, 0) if p.window else (-1, -1)
    assert set(dew) == {(p.is_causal and p.window is None, left)}
    if p.documents:
        (starts,) = contenders.CONTENDERS["dew"](p).masks
        assert starts.tolist() == [0, 100, 130, 192, 292, 322, 384]


def test_dew_refuses(dew):
    causal = small(is_causal=True)
    for changes, reason in (
        ({"head_dim_v": 32}, "value head dim"),
        ({"seqlen_k": 256}, "aligned to the last key"),
        ({"seqlen_k": 256, "window": 20}, "aligned to the last key"),
    ):
        _, records = run.prepare(dataclasses.replace(causal, **changes))
        assert reason in records["dew"]["refused"]
    assert not dew


def test_not_installed(monkeypatch):
    for module in ("dew_flash_attn", "flash_attn3_jax"):
        monkeypatch.setitem(sys.modules, module, None)
    p = dataclasses.replace(
        small(), head_dim=128, head_dim_v=128, contenders=("dew", "flash-attn3-jax")
    )
    calls, records = run.prepare(p)
    assert not calls
    assert all("not installed" in record["refused"] for record in records.values())


def test_wrong_gradients_are_seen(dew, monkeypatch):
    """Each of the three, in the rows of one block of the check."""
    monkeypatch.setattr(check, "GRADIENT_ROWS", 64)
    p = small("bwd", is_causal=True)
    inputs = contenders.PASSES["bwd"].inputs(p)
    grads = contenders.PASSES["bwd"].call(p, "dew", inputs)()
    assert check.check_backward(p, inputs, grads) < 1
    for i, name in enumerate(("dq", "dk", "dv")):
        wrong = list(grads)
        wrong[i] = grads[i].at[-1, 64:128].multiply(1.2)
        with pytest.raises(check.WrongResult, match=name):
            check.check_backward(p, inputs, tuple(wrong))


def test_cudnn_with_two_head_dims(monkeypatch):
    """jax.nn wants value as wide as query, the private function does not: forward and backward lower
    to cuDNN's calls, grouped heads as they are."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    for is_causal, mask in ((False, "NO_MASK"), (True, "CAUSAL")):
        p = point("dims", 192, 128, head_dim_v=128, heads=(4, 2), batch=1, is_causal=is_causal)
        attention = rivals.ATTENTIONS["cudnn"](p).fn
        shapes = (4, 192), (2, 192), (2, 128)
        arrays = [jax.ShapeDtypeStruct((1, 128, *shape), jnp.bfloat16) for shape in shapes]

        def gradients(*qkv, attention=attention):
            out, pullback = jax.vjp(attention, *qkv)
            return pullback(out)

        traced = jax.jit(gradients).trace(*arrays)
        assert [x.shape for x in traced.out_info] == [x.shape for x in arrays]
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__cudnn$fmhaSoftmax(") == text.count("__cudnn$fmhaSoftmaxBackward(") == 1
        assert text.count(f"mask_type\\22: \\22{mask}") == 2
