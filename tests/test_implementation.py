"""A sequence of implementations, tried in order."""

import contextlib
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from lowering import hide_gpus, lower, targets

import jax_fa3
import jax_fa3.context_parallel
import jax_fa3.flax
import jax_fa3.fp8
from jax_fa3 import _dispatch, _ffi

FWD = "jax_fa3.fwd.v1"


def arguments(dtype: Any = jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((2, 16, heads, 64), dtype) for heads in (4, 2, 2)]


def attention(implementation: Any) -> Any:
    return functools.partial(jax_fa3.dot_product_attention, implementation=implementation)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    hide_gpus(monkeypatch)


@pytest.mark.parametrize("sequence", [("fa3", "xla"), ["fa3", None], ("fa3", "fa3", "xla", "fa3")])
def test_sequence_of_implementations(monkeypatch, sequence):
    """The kernels where they can run, or XLA: by platform, arguments and machine."""
    assert targets(lower(attention(sequence), *arguments())) == [FWD]
    assert targets(lower(attention(sequence), *arguments(), platform="cpu")) == []
    zeros = [jnp.zeros(x.shape, x.dtype) for x in arguments()]
    if jax.default_backend() == "cpu":
        assert jax_fa3.dot_product_attention(*zeros, implementation=sequence).shape == (
            2,
            16,
            4,
            64,
        )
    assert targets(lower(attention(sequence), *arguments(jnp.float32))) == []
    for capabilities in ({"8.9"}, {"9.0"}):  # the latter without kernels
        monkeypatch.setattr(_dispatch, "compute_capabilities", lambda found=capabilities: found)
        silent = "xla" in sequence or "9.0" not in capabilities
        with contextlib.nullcontext() if silent else pytest.warns(UserWarning, match="on XLA"):
            assert targets(lower(attention(sequence), *arguments())) == []
    versions = {"driver_version": lambda: 13000, "runtime_version": lambda: 13000}
    built = types.SimpleNamespace(kernels=lambda: [("bfloat16", 64, 64)], **versions)
    monkeypatch.setattr(_ffi, "_C", built)
    assert targets(lower(attention(sequence), *arguments())) == [FWD]


def test_sequences_of_other_functions():
    """All of them pass through the same code."""
    options: Any = {"implementation": ["fa3", "xla"]}
    layer = jax_fa3.flax.nnx.MultiHeadAttention(4, 64, 256, rngs=nnx.Rngs(0), **options)
    x = jnp.zeros((2, 16, 64))
    mesh = jax.make_mesh((1,), ("sp",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec(None, "sp"))
    split = functools.partial(
        jax_fa3.context_parallel.dot_product_attention, axis_name="sp", sharding=whole
    )
    for function in (jax_fa3.fp8.dot_product_attention, split):
        call = functools.partial(function, **options)
        for platform, kernels in (("cuda", True), ("cpu", False)):
            assert bool(targets(lower(call, *arguments(), platform=platform))) == kernels
    assert layer(x).shape == x.shape or jax.default_backend() != "cpu"


def test_sequence_ends_with_its_last_error():
    for sequence in (["fa3"], ("fa3", "fa3")):
        with pytest.raises(
            NotImplementedError, match="implementation='fa3': query: got dtype float32"
        ):
            jax.eval_shape(attention(sequence), *arguments(jnp.float32))
        with pytest.raises(NotImplementedError, match="lowered for platform cpu"):
            lower(attention(sequence), *arguments(), platform="cpu")
    assert targets(lower(attention(("xla", "fa3")), *arguments())) == []  # it takes everything
    assert targets(lower(attention((None, "fa3")), *arguments())) == [FWD]
    assert jax_fa3.is_supported(*arguments(), implementation=["fa3"], device="sm_90") is None
