"""Gemma's layers under jax_fa3.integrations.gemma.attention, against the same layers without it."""

import contextlib
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

pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings("default"),  # Gemma's own, and its dependencies'
]
gemma3, gemma4 = project("gemma", "gemma.gm.nn._modules", "gemma.gm.nn.gemma4._modules")
adapter: Any = importlib.import_module("jax_fa3.integrations.gemma")
B, T, D = 2, 24, 32
positions = jnp.broadcast_to(jnp.arange(T), (B, T))


def layer(version: int, kv_heads: int = 2, sliding: bool = False, **options: Any) -> Any:
    module = {3: gemma3, 4: gemma4}[version]
    kinds = module.AttentionType
    options |= {"attn_type": kinds.LOCAL_SLIDING if sliding else kinds.GLOBAL}
    options |= {"sliding_window_size": 7} if sliding else {}
    newest = {"key_size": 16, "rope_proportion": 1.0}
    own = {"head_dim": 16, "query_pre_attn_scalar": 0.2} if version == 3 else newest
    options = own | options
    return module.Attention(num_heads=4, num_kv_heads=kv_heads, features=D, **options)


causal = np.tri(T, dtype=bool)[None].repeat(B, 0)
image = causal.copy()
image[0, 4:12, 4:12] = True
prompt = causal & (np.arange(T) < np.array([[T], [19]]))[:, None]  # padding on the right
CASES = {
    "gemma 3, multi-head": (layer(3, 4), causal),
    "gemma 3, one key head": (layer(3, 1), causal),
    "gemma 2, soft cap": (layer(3, attn_logits_soft_cap=2.0), causal),
    "gemma 3, sliding": (layer(3, sliding=True, use_qk_norm=True), causal),
    "gemma 3, image": (layer(3, use_qk_norm=True), image),
    "gemma 3, image under a window": (layer(3, sliding=True), image),
    "gemma 3, padding": (layer(3), prompt),
    "gemma 4": (layer(4), causal),
    "gemma 4, sliding": (layer(4, sliding=True), causal),
    "gemma 4, values are keys": (layer(4, k_eq_v=True, rope_proportion=0.5), image),
}


def calls(name: str, dtype: Any = jnp.float32) -> tuple[Any, Any, Any]:
    """The layer's parameters; ours and theirs as functions of them and of x."""
    module, mask = CASES[name]
    x = jnp.ones((B, T, D), dtype)
    params = module.init(jax.random.key(0), x, positions, None, jnp.asarray(mask))
    params = jax.tree.map(lambda x: x.astype(dtype), params)

    def call(context: Any) -> Any:
        def run(params: Any, x: Any) -> Any:
            with context():
                return module.apply(params, x, positions, None, jnp.asarray(mask))[1]

        return run

    return params, call(adapter.attention), call(contextlib.nullcontext)


@pytest.mark.parametrize("name", CASES)
def test_same_as_einsum(name):
    params, ours, theirs = calls(name)
    assert_same_as_theirs(ours, theirs, (params, *inputs([(B, T, D)], jnp.float32)))


@pytest.mark.parametrize("name", CASES)
def test_bf16(name):
    params, ours, theirs = calls(name, jnp.bfloat16)
    assert_no_further(ours, theirs, (params, *inputs([(B, T, D)], jnp.bfloat16)), pooled=True)


@pytest.mark.parametrize("name", CASES)
def test_reaches_the_kernels(name):
    """Masks are arrays in Gemma: the kernels are there for those of one interval a row, and, but under
    a soft cap, for others."""
    params, ours, _ = calls(name, jnp.bfloat16)
    assert_runs_kernels(ours, (params, *inputs([(B, T, D)], jnp.bfloat16)), calls=None)


def test_caches_are_left_to_gemma():
    module, _ = CASES["gemma 3, sliding"]
    params, _, _ = calls("gemma 3, sliding")
    cache = module.init_cache(T, 2, 16, B, jnp.float32)
    row, mask = jnp.ones((B, 1, D)), jnp.ones((B, 1, T), bool)
    wanted = module.apply(params, row, positions[:, :1], cache, mask)
    with adapter.attention():
        found = module.apply(params, row, positions[:, :1], cache, mask)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_in_a_model():
    """Of two layers, by its public name."""
    gm: Any = importlib.import_module("gemma").gm
    config: Any = importlib.import_module("gemma.gm.nn._config").TransformerConfig
    kinds = gemma3.AttentionType.LOCAL_SLIDING, gemma3.AttentionType.GLOBAL
    sizes = {"num_embed": 64, "embed_dim": D, "hidden_dim": 48, "head_dim": 16}
    heads = {"num_heads": 4, "num_kv_heads": 2, "sliding_window_size": 6, "use_qk_norm": True}
    rest = {"final_logit_softcap": None, "use_post_attn_norm": True, "use_post_ffw_norm": True}
    made = config(**sizes, **heads, **rest, attention_types=kinds, vision_encoder=None)
    model = gm.nn.Gemma3_270M(config=made, dtype=jnp.float32)
    tokens = jax.random.randint(jax.random.key(1), (B, T), 2, 60)
    params = model.init(jax.random.key(0), tokens)
    wanted = model.apply(params, tokens).logits
    with adapter.attention():
        found = model.apply(params, tokens).logits
        lowered = lower(lambda p: model.apply(p, tokens).logits, params)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert "jax_fa3" in lowered or not targets(lowered)  # float32 is not for the kernels


def test_a_window_without_a_size_is_refused():
    module, mask = CASES["gemma 3, sliding"]
    broken = module.clone(sliding_window_size=None)
    params, _, _ = calls("gemma 3, sliding")
    with (
        adapter.attention(),
        pytest.raises(NotImplementedError, match="sliding_window_size: got None"),
    ):
        broken.apply(params, jnp.ones((B, T, D)), positions, None, jnp.asarray(mask))
