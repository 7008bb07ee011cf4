"""attention: "jax_fa3" in MaxDiffusion's registry, against its "dot_product"; MaxDiffusion itself where it
is installed, else a stand-in for its interface."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_ins
from flax import linen
from integrations import assert_no_further, assert_runs_kernels, assert_same_as_theirs, inputs
from jax.sharding import Mesh
from lowering import lower, targets

from jax_fa3 import _ffi

pytestmark = pytest.mark.usefixtures("on_cpu")
B, T, S, N, H = 2, 24, 16, 4, 16
SHAPES = (B, T, N * H), (B, S, N * H), (B, S, N * H)
SELF = [(B, T, N * H)] * 3
RULES = [("batch", "data"), ("heads", "tensor"), ("length", "context")]
AXES = "batch", "heads", "length", None


@pytest.fixture(autouse=True, scope="module")
def registry():
    with stand_ins.maxdiffusion():
        importlib.import_module("jax_fa3.integrations.maxdiffusion").install()
        module: Any = importlib.import_module("maxdiffusion.models.attention_dispatch")
        yield module.KERNEL_REGISTRY


def attention(kernel: Any, shape: Any = (1, 1, 1), rules: Any = RULES, **options: Any) -> Any:
    """kernel, on a mesh of data, tensor and context."""
    devices = np.reshape(jax.devices("cpu")[: int(np.prod(shape))], shape)
    context: dict[str, Any] = {"heads": N, "scale": 0.3, "dtype": jnp.float32, "dim_head": H}
    context |= {"mesh": Mesh(devices, ("data", "tensor", "context")), "axis_names_q": AXES}
    context |= {"axis_names_kv": AXES, "attention_mask": None, "residual_checkpoint_name": None}
    context |= {"split_head_dim": True, "float32_qk_product": False}
    context |= {"use_memory_efficient_attention": False} | options

    def call(*arrays: Any) -> Any:
        with linen.logical_axis_rules(rules):
            return kernel(*arrays, context)

    return call


MASKS = {
    "none": None,
    "text padded at its end": jnp.arange(S) < jnp.array([[S], [9]]),
    "padding between text and image": (jnp.arange(S) < 3)
    | (jnp.arange(S) >= jnp.array([[5], [9]])),
}


@pytest.mark.parametrize("name", MASKS)
def test_same_as_dot_product(name, registry):
    ours, theirs = (
        attention(registry[x], attention_mask=MASKS[name]) for x in ("jax_fa3", "dot_product")
    )
    assert_same_as_theirs(ours, theirs, inputs(SHAPES, jnp.float32))


@pytest.mark.parametrize("mesh", [(2, 2, 1), (1, 1, 4), (2, 1, 2), (1, 2, 4)])
def test_sharded(mesh, registry):
    """Over batch and heads; a split sequence is a ring."""
    ours, theirs = attention(registry["jax_fa3"], mesh), attention(registry["dot_product"])
    assert_same_as_theirs(ours, theirs, inputs(SELF, jnp.float32))


def test_arrays_by_head(registry):
    found = inputs([(B, N, T, H)] * 3, jnp.float32)
    flat = [jnp.swapaxes(x, 1, 2).reshape(B, T, -1) for x in found]
    wanted = attention(registry["dot_product"])(*flat)
    np.testing.assert_allclose(attention(registry["jax_fa3"])(*found), wanted, atol=1e-5)


def test_bf16(registry):
    ours, theirs = (attention(registry[x], dtype=jnp.bfloat16) for x in ("jax_fa3", "dot_product"))
    assert_no_further(ours, theirs, inputs(SHAPES, jnp.bfloat16))


def test_reaches_the_kernels(registry):
    call = attention(registry["jax_fa3"], dtype=jnp.bfloat16)
    assert_runs_kernels(call, inputs(SHAPES, jnp.float32))


def test_a_policy_that_saves_the_residuals_runs_the_forward_once(registry):
    def forwards(name: str | None) -> int:
        options = {"dtype": jnp.bfloat16, "residual_checkpoint_name": name}
        call = attention(registry["jax_fa3"], **options)
        policy = jax.checkpoint_policies.save_only_these_names("self_attn")
        function = jax.checkpoint(lambda *x: jnp.sin(call(*x)).sum(), policy=policy)
        found = lower(jax.value_and_grad(function), *inputs(SHAPES, jnp.bfloat16))
        return targets(found).count(_ffi.FWD)

    assert (forwards("self_attn"), forwards(None)) == (1, 2)


def test_refused_by_name(registry):
    ring = attention(registry["jax_fa3"], (1, 1, 2), attention_mask=jnp.ones((B, T), bool))
    with pytest.raises(NotImplementedError, match="attention_mask: got it where the sequence is"):
        ring(*inputs(SELF, jnp.float32))
    rules = [("length", ("tensor", "context"))]
    two = attention(registry["jax_fa3"], (1, 2, 2), rules)
    with pytest.raises(NotImplementedError, match=r"axis_names_q: got \['tensor', 'context'\]"):
        two(*inputs(SELF, jnp.float32))
