"""attention: "jax_fa3" in MaxDiffusion's registry, against its "dot_product"; MaxDiffusion itself where it
is installed, else a stand-in for its interface."""

import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from integrations import assert_no_further, assert_runs_kernels, assert_same_as_theirs, inputs
from jax.sharding import Mesh
from lowering import lower, targets
from maxdiffusion_stand_in import maxdiffusion

from jax_fa3 import _ffi

pytestmark = pytest.mark.usefixtures("on_cpu")
B, T, S, N, H = 2, 24, 16, 4, 16
SHAPES = (B, T, N * H), (B, S, N * H), (B, S, N * H)
SELF = [(B, T, N * H)] * 3
AXES = "data", "fsdp", "context", "tensor"  # of the mesh, and as its configurations call them
ROWS, KEYS = "activation_cross_attn_q_length", "activation_cross_attn_kv_length"
NAMES = "activation_batch", "activation_cross_attn_heads", ROWS, "activation_kv"
BATCH = ("activation_batch", ("data", "fsdp"))
# Of src/maxdiffusion/configs/base_wan_14b.yml, for self and for cross attention, and of common_types.py.
WAN_SELF = [BATCH, ("activation_cross_attn_heads", ("context", "tensor"))]
WAN_CROSS = [BATCH, (ROWS, ("context", "tensor"))]
SEQUENCE = [BATCH, (ROWS, "context")]
RING = [BATCH, (ROWS, "context"), (KEYS, "context")]


@pytest.fixture(autouse=True, scope="module")
def installed():
    with maxdiffusion():
        importlib.import_module("jax_fa3.integrations.maxdiffusion").install()
        yield


def attention(kernel: str, mesh: Any = (1, 1, 1, 1), rules: Any = WAN_SELF, **options: Any) -> Any:
    """As NNXAttentionOp.apply_attention calls it."""
    devices = np.reshape(jax.devices("cpu")[: int(np.prod(mesh))], mesh)
    arguments: dict[str, Any] = {"heads": N, "scale": 0.3, "dtype": jnp.float32, "dim_head": H}
    arguments |= {"mesh": Mesh(devices, AXES), "axis_names_q": NAMES}
    arguments["axis_names_kv"] = tuple(KEYS if x == ROWS else x for x in NAMES)
    arguments |= {"split_head_dim": True, "float32_qk_product": False, "dpa_layer": None}
    arguments |= {"use_memory_efficient_attention": False, "flash_block_sizes": None}
    arguments |= {"attention_kernel": kernel, "flash_min_seq_length": 0} | options
    module: Any = importlib.import_module("maxdiffusion.models.attention_flax")

    def call(*arrays: Any) -> Any:
        with linen.logical_axis_rules(rules):
            return module._apply_attention(*arrays, **arguments)

    return call


def takes(name: str) -> bool:
    """Whether its attention has an argument, which some versions lack."""
    module: Any = importlib.import_module("maxdiffusion.models.attention_flax")
    return name in inspect.signature(module._apply_attention).parameters


MASKS = {
    "none": None,
    "text padded at its end": jnp.arange(S) < jnp.array([[S], [9]]),
    "of all sequences, in integers": (jnp.arange(S) < 11)[None].astype(int),
    "padding between text and image": (jnp.arange(S) < 3)
    | (jnp.arange(S) >= jnp.array([[5], [9]])),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    ("mesh", "rules"),
    [((1, 1, 1, 1), WAN_CROSS), ((2, 1, 2, 2), WAN_CROSS), ((1, 2, 1, 2), WAN_SELF)],
    ids=["one device", "rows split", "heads split"],
)
def test_same_as_dot_product(name, mesh, rules):
    ours = attention("jax_fa3", mesh, rules, attention_mask=MASKS[name])
    theirs = attention("dot_product", attention_mask=MASKS[name])
    assert_same_as_theirs(ours, theirs, inputs(SHAPES, jnp.float32))


def test_masks_of_other_lengths():
    """What is after a mask's end is hidden, what is after the keys' ignored."""
    wanted = jnp.arange(S) < jnp.array([[12], [9]])
    found = inputs(SHAPES, jnp.float32)
    theirs = attention("dot_product", attention_mask=wanted)(*found)
    for mask in (wanted[:, :12], jnp.pad(wanted, ((0, 0), (0, 5)), constant_values=True)):
        ours = attention("jax_fa3", attention_mask=mask)(*found)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ((2, 1, 1, 2), WAN_SELF),
        ((1, 1, 2, 2), WAN_SELF),
        ((1, 1, 4, 2), SEQUENCE),
        ((1, 1, 4, 1), RING),
        ((1, 2, 2, 1), RING),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_sharded(mesh, rules, causal):
    if causal and not takes("is_causal"):
        pytest.skip("this version of MaxDiffusion has no causal attention")
    ours = attention("jax_fa3", mesh, rules, **({"is_causal": True} if causal else {}))

    def theirs(*arrays: Any) -> Any:
        query, key, value = (x.reshape(B, -1, N, H) for x in arrays)
        out = jax.nn.dot_product_attention(query, key, value, scale=0.3, is_causal=causal)
        return out.reshape(B, T, -1)

    assert_same_as_theirs(ours, theirs, inputs(SELF, jnp.float32))


def test_rows_that_the_mesh_does_not_divide():
    shapes = (B, 21, N * H), *SHAPES[1:]
    ours, theirs = attention("jax_fa3", (1, 1, 2, 2), WAN_CROSS), attention("dot_product")
    assert_same_as_theirs(ours, theirs, inputs(shapes, jnp.float32))


@pytest.mark.parametrize("rules", [WAN_SELF, WAN_CROSS])
def test_arrays_by_head(rules):
    found = inputs([(B, N, T, H)] * 3, jnp.float32)
    flat = [jnp.swapaxes(x, 1, 2).reshape(B, T, -1) for x in found]
    wanted = attention("dot_product")(*flat)
    ours = attention("jax_fa3", (1, 1, 2, 2), rules)
    np.testing.assert_allclose(ours(*found), wanted, atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_bf16(name):
    options = {"dtype": jnp.bfloat16, "attention_mask": MASKS[name]}
    ours, theirs = (attention(x, **options) for x in ("jax_fa3", "dot_product"))
    assert_no_further(ours, theirs, inputs(SHAPES, jnp.bfloat16))


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (1, 1, 2, 2)])
@pytest.mark.parametrize("rules", [WAN_SELF, WAN_CROSS])
@pytest.mark.parametrize("name", MASKS)
def test_reaches_the_kernels(mesh, rules, name):
    call = attention("jax_fa3", mesh, rules, dtype=jnp.bfloat16, attention_mask=MASKS[name])
    assert_runs_kernels(call, inputs(SHAPES, jnp.float32))


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (1, 1, 2, 2)])
def test_a_policy_that_saves_the_residuals_runs_the_forward_once(mesh):
    def forwards(name: str | None) -> int:
        options = {"dtype": jnp.bfloat16, "residual_checkpoint_name": name}
        call = attention("jax_fa3", mesh, WAN_CROSS, **options)
        policy = jax.checkpoint_policies.save_only_these_names("self_attn")
        function = jax.checkpoint(lambda *x: jnp.sin(call(*x)).sum(), policy=policy)
        found = lower(jax.value_and_grad(function), *inputs(SHAPES, jnp.bfloat16))
        return targets(found).count(_ffi.FWD)

    assert (forwards("self_attn"), forwards(None)) == (1, 2)


def test_refused_by_name():
    ring = attention("jax_fa3", (1, 1, 2, 1), RING, attention_mask=jnp.ones((B, T), bool))
    with pytest.raises(NotImplementedError, match="attention_mask: got it where keys are split"):
        ring(*inputs(SELF, jnp.float32))
    rules = [(ROWS, ("context", "tensor")), (KEYS, ("context", "tensor"))]
    two = attention("jax_fa3", (1, 1, 2, 2), rules)
    with pytest.raises(
        NotImplementedError, match=r"axis_names_kv: got \('context', 'tensor'\) for"
    ):
        two(*inputs(SELF, jnp.float32))
