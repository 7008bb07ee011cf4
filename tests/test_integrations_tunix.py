"""use_flash_attention of Tunix's models after jax_fa3.integrations.tunix.install, against their einsum."""

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

pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings("default"),  # Tunix's own, and its dependencies'
]
models = "tunix.models.qwen2.model", "tunix.models.qwen3.model", "tunix.models.gemma4.model"
qwen2, qwen3, gemma4, nnx = project("google-tunix", *models, "flax.nnx")
mask_lib: Any = qwen3.mask_lib
adapter: Any = importlib.import_module("jax_fa3.integrations.tunix")
B, T = 4, 24


@pytest.fixture(autouse=True, scope="module")
def installed():
    """And as it was afterwards."""
    modules: list[Any] = list(map(importlib.import_module, adapter.MODELS))
    originals = [module.splash for module in modules]
    adapter.install()
    yield
    for module, original in zip(modules, originals, strict=True):
        module.splash = original


LAYERS = "Qwen 2", "Qwen 3", "Gemma 4, global", "Gemma 4, sliding"


def layer(name: str, flash: bool, dtype: Any) -> tuple[Any, Any]:
    """A layer, and what calls it with x [B, T, 32] and segment ids."""
    sizes = {"num_layers": 1, "embed_dim": 32, "hidden_dim": 32, "num_heads": 4, "num_kv_heads": 2}
    sizes |= {"head_dim": 16, "use_flash_attention": flash, "dtype": dtype, "param_dtype": dtype}
    causal = jnp.broadcast_to(jnp.tri(T, dtype=bool), (B, T, T))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    if name.startswith("Gemma"):
        kind = gemma4.AttentionType["LOCAL_SLIDING" if "sliding" in name else "GLOBAL"]
        sizes |= {"num_embed": 32, "sliding_window_size": 7, "global_key_size": 24}
        config = gemma4.ModelConfig(**sizes, use_sliding_window_kv_cache=False)
        made = gemma4.Attention(config, kind, rngs=nnx.Rngs(0))
        return made, lambda layer, x, _: layer(x, positions, None, causal)[1]
    module = {"Qwen 2": qwen2, "Qwen 3": qwen3}[name]
    config = module.ModelConfig(**sizes, vocab_size=32, rope_theta=10000, norm_eps=1e-6)
    made = module.Attention(config, rngs=nnx.Rngs(0))
    if module is qwen3:
        return made, lambda layer, x, ids: layer(x, positions, None, causal, segment_ids=ids)[1]
    rotary = [x.astype(dtype) for x in qwen2._generate_pos_embeddings(positions, 16, 10000)]
    return made, lambda layer, x, ids: layer(x, None, causal, *rotary, segment_ids=ids)[1]


def attention(
    name: str,
    flash: bool,
    dtype: Any = jnp.float32,
    segment_ids: Any = None,
    shape: tuple[int, int] = (2, 2),
) -> tuple[Any, Any]:
    """The layer's weights, and the layer as a function of them and of x, on a mesh."""
    devices = np.reshape(jax.devices("cpu")[: np.prod(shape)], shape)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tp"))
    made, run = layer(name, flash, dtype)
    graph, weights = nnx.split(made)

    def call(weights: Any, x: Any) -> Any:
        with mesh:
            return run(nnx.merge(graph, weights), x, segment_ids)

    return weights, call


ids = np.ones((B, T), np.int32)
ids[1, :5] = ids[1, 20:] = 0  # a rollout: padding on both sides
real = jnp.asarray(ids > 0)[..., None]


@pytest.mark.parametrize("name", LAYERS)
def test_same_as_einsum(name):
    (weights, ours), (_, theirs) = attention(name, True), attention(name, False)
    assert_same_as_theirs(ours, theirs, (weights, *inputs([(B, T, 32)], jnp.float32)))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=["one device", "mesh"])
def test_bf16(name, shape):
    """Qwen 2 has biases, and Gemma 4 norms, of few numbers; on several CPUs ours has sums between devices, in
    bf16, where Tunix splits its einsum over none."""
    (weights, ours), (_, theirs) = (
        attention(name, flash, jnp.bfloat16, shape=shape) for flash in (True, False)
    )
    arrays = weights, *inputs([(B, T, 32)], jnp.bfloat16)
    exact = attention(name, False, shape=shape)[1]
    pooled = shape != (1, 1) or name in ("Qwen 2", *LAYERS[2:])
    assert_no_further(ours, theirs, arrays, exact=exact, pooled=pooled)
    assert ours(*arrays).dtype == jnp.bfloat16


SPLASH_MASKS = {
    "causal": (lambda: mask_lib.CausalMask((T, T)), {"is_causal": True}),
    "sliding": (lambda: mask_lib.LocalMask((T, T), window_size=(6, 0), offset=0), {}),
    "both sides": (lambda: mask_lib.LocalMask((T, T), window_size=(6, 3), offset=0), {}),
    "open to the left": (lambda: mask_lib.LocalMask((T, T), window_size=(None, 2), offset=0), {}),
}


@pytest.mark.parametrize("name", SPLASH_MASKS)
def test_same_as_its_own_mask(name):
    """What the kernel that the models make shows, against the mask's own array."""
    mask = SPLASH_MASKS[name][0]()
    kernel = gemma4.splash.make_splash_mha(
        mask_lib.MultiHeadMask([mask] * 4), block_sizes=None, head_shards=1, q_seq_shards=1
    )
    segments = gemma4.splash.SegmentIds(jnp.asarray(ids), jnp.asarray(ids))
    visible = jnp.asarray(mask[:, :]) & (ids[:, None, :] == ids[:, :, None])

    def ours(q: Any, k: Any, v: Any) -> Any:
        out = jax.vmap(kernel)(q, k, v, segment_ids=segments)
        return jnp.where(real[:, None], out, 0)

    def theirs(q: Any, k: Any, v: Any) -> Any:
        scores = jnp.einsum("bnth,bnsh->bnts", q, jnp.repeat(k, 2, 1))
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, qwen3.K_MASK))
        return jnp.where(
            real[:, None], jnp.einsum("bnts,bnsh->bnth", weights, jnp.repeat(v, 2, 1)), 0
        )

    shapes = (B, 4, T, 16), (B, 2, T, 16), (B, 2, T, 16)
    assert_same_as_theirs(ours, theirs, inputs(shapes, jnp.float32))


@pytest.mark.parametrize("name", LAYERS)
def test_reaches_the_kernels(name):
    weights, ours = attention(name, True, jnp.bfloat16, jnp.asarray(ids))
    assert_runs_kernels(ours, (weights, *inputs([(B, T, 32)], jnp.bfloat16)))


def test_refused_by_name():
    def make(masks: Any, parts: int = 1) -> Any:
        return qwen3.splash.make_splash_mha(
            mask_lib.MultiHeadMask(masks), block_sizes=None, head_shards=1, q_seq_shards=parts
        )

    causal = mask_lib.CausalMask((T, T))
    with pytest.raises(NotImplementedError, match="shd_config: got a sequence over 2 devices"):
        make([causal], parts=2)
    with pytest.raises(NotImplementedError, match="mask: got masks that differ between heads"):
        make([causal, mask_lib.LocalMask((T, T), window_size=(3, 0), offset=0)])
    with pytest.raises(NotImplementedError, match="mask: got FullMask, wanted a CausalMask"):
        make([mask_lib.FullMask((T, T))])
