"""attn_mechanism="jax_fa3" in EasyDeL's registry, against its "vanilla"."""

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

from jax_fa3 import _ffi

operations, masks = project("easydel", "easydel.operations", "ejkernel.types.mask")
adapter: Any = importlib.import_module("jax_fa3.integrations.easydel")
pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings("default"),  # EasyDeL's own, and its dependencies'
]

B, T, N, K, H = 2, 32, 4, 2, 16
SHAPES = (B, T, N, H), (B, T, K, H), (B, T, K, H)
AXES = "dp", "fsdp", "ep", "tp", "sp"
MaskInfo = masks.MaskInfo


@pytest.fixture(autouse=True, scope="module")
def installed():
    """And as it was afterwards."""
    adapter.install()
    yield
    del operations.OperationRegistry._registry[adapter.MECHANISM]


def attention(name: str, dtype: Any = jnp.float32, mesh: Any = (1,) * 5, **options: Any) -> Any:
    devices = np.array(jax.devices("cpu")[: int(np.prod(mesh))]).reshape(mesh)

    def call(*arrays: Any) -> Any:
        with jax.sharding.Mesh(devices, AXES):
            metadata = operations.OperationMetadata(
                runtime_dtype=dtype, runtime_softmax_dtype=jnp.float32, platform="jax"
            )
            operation = operations.OperationRegistry.create(name, metadata)
            query, key, value, *sinks = arrays
            given = options | ({"softmax_aux": sinks[0]} if sinks else {})
            if "mask_info" in given:  # which keeps what it computes, a tracer too
                given["mask_info"] = given["mask_info"]()
            return operation(query=query, key=key, value=value, **given).attention_outputs

    return call


ids = np.repeat([[0, 1, 2, 3], [5, 5, 7, -1]], T // 4, axis=1)
real = jnp.asarray(ids >= 0)[..., None, None]
image = np.tri(T, dtype=bool)[None, None] | np.zeros((B, 1, T, T), bool)
image[:, :, 8:16, 8:16] = True


def documents() -> Any:
    return MaskInfo.from_segments(jnp.asarray(ids))


CASES = {
    "full": {},
    "causal": {"causal": True},
    "scale, soft cap": {"causal": True, "softmax_scale": 0.3, "logits_soft_cap": 2.0},
    "window": {"causal": True, "sliding_window": (9, 0)},
    "window, both sides": {"sliding_window": 5},
    "documents": {"causal": True, "mask_info": documents},
    "padding": {
        "causal": True,
        "mask_info": lambda: MaskInfo.dynamic_init(attention_mask=real[..., 0, 0]),
    },
    "image": {"mask_info": lambda: MaskInfo.dynamic_init(attention_mask=jnp.asarray(image))},
    "bias": {"causal": True, "bias": jax.random.normal(jax.random.key(9), (B, N, T, T))},
    "init_bias": {"init_bias": lambda: jnp.linspace(0, 3, B * N * T * T).reshape(B, N, T, T)},
}


def on_real_rows(call: Any) -> Any:
    return lambda *arrays: jnp.where(real, call(*arrays), 0)


@pytest.mark.parametrize("name", CASES)
def test_same_as_vanilla(name):
    ours, theirs = (on_real_rows(attention(x, **CASES[name])) for x in ("jax_fa3", "vanilla"))
    assert_same_as_theirs(ours, theirs, inputs(SHAPES, jnp.float32))


@pytest.mark.parametrize("shape", [(N,), (K,), (3,), (N, 2), (K, 3), (1, 5)])
def test_sinks(shape):
    """Several of a head are given to "vanilla", which has no such, joined."""
    arrays = *inputs(SHAPES, jnp.float32), jax.random.normal(jax.random.key(3), shape)
    ours, theirs = (attention(x, causal=True) for x in ("jax_fa3", "vanilla"))

    def joined(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        if sinks.ndim == 2:
            sinks = jax.nn.logsumexp(sinks, axis=1)
            sinks = jnp.repeat(sinks, N // sinks.shape[0])
        return theirs(query, key, value, sinks)

    assert_same_as_theirs(ours, joined, arrays)


@pytest.mark.parametrize("mesh", [(1, 2, 1, 2, 1), (1, 8, 1, 1, 1), (1, 1, 1, 2, 2)])
def test_sharded(mesh):
    found, options = inputs(SHAPES, jnp.float32), CASES["documents"]
    ours = on_real_rows(attention("jax_fa3", mesh=mesh, **options))
    assert_same_as_theirs(ours, on_real_rows(attention("vanilla", **options)), found)


def test_decoding():
    """One row, and a cache that its mask ends."""
    shapes = (B, 1, N, H), (B, T, K, H), (B, T, K, H)
    seen = jnp.arange(T)[None, None, None] < jnp.array([3, 20]).reshape(B, 1, 1, 1)
    options = {"causal": True, "mask_info": lambda: MaskInfo.from_attention_mask(seen)}
    ours, theirs = (attention(x, **options) for x in ("jax_fa3", "vanilla"))
    assert_same_as_theirs(ours, theirs, inputs(shapes, jnp.float32))


@pytest.mark.parametrize("name", CASES)
def test_bf16(name):
    ours, theirs = (
        on_real_rows(attention(x, jnp.bfloat16, **CASES[name])) for x in ("jax_fa3", "vanilla")
    )
    exact = on_real_rows(attention("vanilla", **CASES[name]))
    assert_no_further(ours, theirs, inputs(SHAPES, jnp.bfloat16), exact=exact)


@pytest.mark.parametrize("name", CASES)
def test_reaches_the_kernels(name):
    """A float32 model too, by EasyDeL's attn_dtype."""
    call = attention("jax_fa3", jnp.bfloat16, **CASES[name])
    calls = None if name in ("padding", "image") else 1  # dense masks
    assert_runs_kernels(call, inputs(SHAPES, jnp.float32), calls)


def test_a_policy_that_saves_attention_runs_the_forward_once():
    call = attention("jax_fa3", jnp.bfloat16, causal=True)

    def forwards(*names: str) -> int:
        utils: Any = importlib.import_module("easydel.infra.utils")
        policy = utils.get_gradient_checkpoint_policy("save_only_these_names", save_names=names)
        function = jax.checkpoint(lambda *x: jnp.sin(call(*x)).sum(), policy=policy)
        found = lower(jax.value_and_grad(function), *inputs(SHAPES, jnp.bfloat16))
        return targets(found).count(_ffi.FWD)

    assert (forwards(adapter.CHECKPOINT_NAME), forwards("mlp_output")) == (1, 2)


def test_dropout():
    """Other weights than EasyDeL's are dropped, with the same mean and spread."""
    found, options = inputs(SHAPES, jnp.float32), {"causal": True, "dropout_prob": 0.25}
    exact = attention("vanilla", causal=True)(*found)
    keys = jax.random.split(jax.random.key(1), 200)
    off = attention("jax_fa3", **options, dropout_rng=keys[0])(*found)  # deterministic
    np.testing.assert_allclose(off, exact, atol=1e-5)

    def outs(mechanism: str) -> Any:
        return jax.lax.map(
            lambda key: attention(mechanism, **options, deterministic=False, dropout_rng=key)(
                *found
            ),
            keys,
        )

    ours, theirs = outs("jax_fa3"), outs("vanilla")
    assert np.abs(ours[0] - ours[1]).max() > 0.1
    limit = 6 * ours.std(0).max() / np.sqrt(len(keys))
    np.testing.assert_allclose(ours.mean(0), exact, atol=limit)
    np.testing.assert_allclose(ours.std(0).mean(), theirs.std(0).mean(), rtol=0.05)


REFUSED = {
    "bias: got it beside mask_info": CASES["bias"] | CASES["documents"],
    "cum_seqlens_q: got": {"cum_seqlens_q": jnp.array([0, T])},
    "unnormalized_output: got True": {"normalize_output": False},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message):
    with pytest.raises(NotImplementedError, match=message):
        attention("jax_fa3", **REFUSED[message])(*inputs(SHAPES, jnp.float32))


def test_in_a_layer():
    """By the configuration's key, as a model comes to it."""
    infra, layers = map(importlib.import_module, ("easydel.infra", "easydel.layers.attention"))
    found = inputs(SHAPES, jnp.float32)

    def run(mechanism: str) -> Any:
        config: Any = infra.EasyDeLBaseConfig(
            attn_mechanism=mechanism, attn_dtype=jnp.float32, sharding_axis_dims=(1, 1, 1, 1, -1)
        )
        layer = layers.FlexibleAttentionModule(config, softmax_scale=0.25)
        return layer(*found, mode="train", mask_info=documents(), causal=True).attention_outputs

    ours, theirs = run(adapter.MECHANISM), run("vanilla")
    np.testing.assert_allclose(jnp.where(real, ours, 0), jnp.where(real, theirs, 0), atol=1e-5)
