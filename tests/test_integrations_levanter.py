"""Levanter's backend "nvte" after jax_fa3.integrations.levanter.install, against its "vanilla"."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integrations import (
    assert_no_further,
    assert_runs_kernels,
    assert_same_as_theirs,
    inputs,
    project,
)
from lowering import lower, targets

import jax_fa3
from jax_fa3 import _ffi

lv, hax = project("marin-levanter", "levanter.layers.attention", "haliax")
pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings("default"),  # Levanter's own, and its dependencies'
]

Batch, QPos, KPos, KVHeads, Group, D = hax.make_axes(b=2, q=24, k=20, kv=2, g=3, d=16)
AXES = (Batch, KVHeads, Group, QPos, D), (Batch, KPos, KVHeads, D), (Batch, KPos, KVHeads, D)
SHAPES = [tuple(axis.size for axis in axes) for axes in AXES]
Mask = lv.AttentionMask


@pytest.fixture(autouse=True, scope="module")
def installed():
    """And as it was afterwards."""
    original = lv._te_flash_attention
    importlib.import_module("jax_fa3.integrations.levanter").install()
    yield
    lv._te_flash_attention = original


def attention(backend: str, **options: Any) -> Any:
    def call(*arrays: Any) -> Any:
        named = [hax.named(x, axes) for x, axes in zip(arrays, AXES, strict=True)]
        out = lv.dot_product_attention(
            QPos, KPos, D, *named, attn_backend=lv.AttentionBackend(backend), **options
        )
        return out.rearrange(("b", "kv", "g", "q", "d")).array

    return call


def segments(ids: Any, axis: Any) -> Any:
    return hax.named(jnp.asarray(ids), axis)


ids = np.repeat([[0, 1, 2], [4, 4, 7]], 8, axis=1)
pair = segments(ids, (Batch, QPos)), segments(ids[:, :20], (Batch, KPos))
one = segments(ids[0], QPos), segments(ids[0, :20], KPos)
scattered = (np.indices((24, 20)).sum(0) % 3 == 0) | np.eye(24, 20, dtype=bool)
scattered[:, 0] = True
by_head = (np.indices((24, 20, 3)).sum(0) % 2 == 0) | (np.arange(20) == 0)[:, None]


def normal(*axes: Any) -> Any:
    shape = [axis.size for axis in axes]
    return hax.named(jax.random.normal(jax.random.key(5), shape), axes)


CASES = {
    "full": {},
    "causal": {"mask": Mask.causal()},
    "offset": {"mask": Mask.causal(offset=3)},
    "offset by entry": {"mask": Mask.causal(offset=hax.named(jnp.array([2, 5]), Batch))},
    "window": {"mask": Mask.causal(sliding_window=9)},
    "window, offset": {"mask": Mask.causal(sliding_window=9, offset=2)},
    "both sides": {"mask": Mask.bidirectional_sliding_window(6)},
    "segments": {"mask": Mask.causal(segment_ids=pair)},
    "segments of all": {"mask": Mask(segment_ids=one)},
    "explicit": {"mask": Mask.explicit(hax.named(jnp.asarray(scattered), (QPos, KPos)))},
    "explicit by head, causal": {
        "mask": Mask.causal() & Mask.explicit(hax.named(jnp.asarray(by_head), (QPos, KPos, Group)))
    },
    "named array": {"mask": hax.named(jnp.asarray(scattered), (QPos, KPos))},
    "bias": {"mask": Mask.causal(), "bias": normal(KVHeads, Group, QPos, KPos)},
    "bias of keys": {"bias": normal(Batch, KPos)},
    "soft cap, scale": {"mask": Mask.causal(), "logits_soft_cap": 2.0, "scaling_factor": 0.5},
}


def both(**options: Any) -> tuple[Any, Any]:
    """Ours and theirs without rows 20 on, which some of these masks let see nothing."""

    def seeing(backend: str) -> Any:
        call = attention(backend, **options)
        return lambda *x: jnp.where((jnp.arange(24) < 20)[:, None], call(*x), 0)

    return seeing("nvte"), seeing("vanilla")


@pytest.mark.parametrize("name", CASES)
def test_same_as_vanilla(name):
    assert_same_as_theirs(*both(**CASES[name]), inputs(SHAPES, jnp.float32))


@pytest.mark.parametrize("options", [{}, {"attention_dtype": jnp.float32}], ids=["", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_bf16(name, options):
    ours, theirs = both(**CASES[name], **options)
    assert_no_further(ours, theirs, inputs(SHAPES, jnp.bfloat16))
    assert ours(*inputs(SHAPES, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", CASES)
def test_reaches_the_kernels(name):
    assert_runs_kernels(attention("nvte", **CASES[name]), inputs(SHAPES, jnp.bfloat16))


def test_a_float32_model_reaches_the_kernels_by_attention_dtype():
    call = attention("nvte", mask=Mask.causal(), attention_dtype=jnp.bfloat16)
    assert_runs_kernels(call, inputs(SHAPES, jnp.float32))
    assert call(*inputs(SHAPES, jnp.float32)).dtype == jnp.float32


def test_soft_cap_of_the_sum_with_a_bias():
    options = {"bias": 3 * normal(QPos, KPos), "logits_soft_cap": 2.0}
    ours, theirs = (attention(x, **options) for x in ("nvte", "vanilla"))
    assert_same_as_theirs(ours, theirs, inputs(SHAPES, jnp.float32))


def test_dropout():
    options = {"mask": Mask.causal(), "dropout": 0.25, "inference": False}
    keys, found = jax.random.split(jax.random.key(1), 1000), inputs(SHAPES, jnp.float32)
    ours, theirs = (
        jax.vmap(lambda key, name=name: attention(name, prng=key, **options)(*found))(keys)
        for name in ("nvte", "vanilla")
    )
    exact = attention("vanilla", mask=Mask.causal())(*found)
    assert np.abs(ours[0] - ours[1]).max() > 0.1
    np.testing.assert_allclose(ours.mean(0), exact, atol=6 * ours.std(0).max() / np.sqrt(1000))
    np.testing.assert_allclose(ours.std(0).mean(), theirs.std(0).mean(), rtol=0.02)
    off = attention("nvte", mask=Mask.causal(), dropout=0.25, inference=True)(*found)
    np.testing.assert_allclose(off, exact, atol=1e-5)


def test_values_of_another_axis_are_refused():
    value = hax.ones((Batch, KPos, KVHeads, D.alias("v")))
    query, key = (
        hax.named(x, y) for x, y in zip(inputs(SHAPES, jnp.float32)[:2], AXES[:2], strict=True)
    )
    with pytest.raises(NotImplementedError, match="value: got axes .*, wanted d=?.* among them"):
        lv._te_flash_attention(QPos, KPos, D, query, key, value, scaling_factor=1.0)


@pytest.mark.parametrize(
    ("policy", "forwards"),
    [("save_all", 1), ("full", 2), (list(jax_fa3.RESIDUAL_NAMES), 1), (["another"], 2)],
    ids=str,
)
def test_policies_that_save_the_residuals_run_the_forward_once(policy, forwards):
    """Levanter's own, by their names, and by a list of what a block shall save."""
    scan: Any = importlib.import_module("levanter.layers.scan_checkpoint").ScanCheckpointPolicy
    if isinstance(policy, list):
        made = scan(save_carries=False, save_inputs=False, save_block_internals=policy)
    else:
        made = scan.from_bool_or_str(policy)
    call = attention("nvte", mask=Mask.causal())
    function = made.checkpoint("carry", "inputs", lambda *x: jnp.sin(call(*x)).sum())
    found = targets(lower(jax.value_and_grad(function), *inputs(SHAPES, jnp.bfloat16)))
    assert (found.count(_ffi.FWD), found.count(_ffi.BWD)) == (forwards, 1)


@pytest.mark.parametrize("mask", [Mask.causal(), Mask.causal(sliding_window=9)], ids=["", "window"])
def test_in_a_model(mask):
    """Llama's, of two layers: its logits, and the gradients of its weights."""
    llama, eqx = (importlib.import_module(x) for x in ("levanter.models.llama", "equinox"))
    Vocab, tokens = hax.Axis("vocab", 48), jax.random.randint(jax.random.key(1), (2, 24), 0, 48)
    sizes = {"hidden_dim": 32, "intermediate_dim": 48, "num_heads": 4, "num_kv_heads": 2}

    def model(backend: str) -> tuple[Any, Any]:
        config = llama.LlamaConfig(
            max_seq_len=24, num_layers=2, attn_backend=lv.AttentionBackend(backend), **sizes
        )
        made = llama.LlamaLMHeadModel.init(Vocab, config, key=jax.random.key(0))
        weights, static = eqx.partition(made, eqx.is_inexact_array)
        leaves, tree = jax.tree.flatten(weights)
        ids = hax.named(tokens, ("batch", config.max_Pos))

        def logits(*leaves: Any) -> Any:
            return eqx.combine(tree.unflatten(leaves), static)(ids, attn_mask=mask).array

        return leaves, logits

    (weights, ours), (_, theirs) = model("nvte"), model("vanilla")
    assert_same_as_theirs(ours, theirs, weights)
