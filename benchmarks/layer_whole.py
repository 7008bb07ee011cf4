"""For layers.py, as layer_projects.py: the layers of projects whose attention does not part from their
projections, as functions of weights and inputs, so that the backward is of both."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import layer_projects
from .layer_projects import DEFAULT, OURS, Layer

GEMMA_FEATURES, QWEN_FEATURES = 3584, 4096  # Gemma 2 9B's and Qwen 3 8B's
GEMMA_CAP = 50.0


def equinox_layers(implementation: Any) -> Iterator[Layer]:
    """A MultiheadAttention of a batch."""
    equinox: Any = importlib.import_module("equinox")
    adapter: Any = importlib.import_module("jax_fa3.integrations.equinox")
    b, t, n, _, h = layer_projects.SIZES
    layer = equinox.nn.MultiheadAttention(n, n * h, dtype=jnp.bfloat16, key=jax.random.key(1))
    weights, rest = equinox.partition(layer, equinox.is_array)

    def of_batch(call: Callable[..., Any], weights: Any, *arrays: Any) -> Any:
        layer = equinox.combine(weights, rest)
        return jax.vmap(functools.partial(call, layer))(*arrays)

    def default(layer: Any, q: Any, k: Any, v: Any) -> Any:
        return layer(q, k, v, jnp.tri(t, dtype=bool))

    ours = functools.partial(
        adapter.multihead_attention, is_causal=True, implementation=implementation
    )
    calls = {OURS: functools.partial(of_batch, ours), DEFAULT: functools.partial(of_batch, default)}
    inputs = layer_projects.tensors((b, t, n, n, h))
    yield Layer("Equinox, causal", (weights, *(x.reshape(b, t, n * h) for x in inputs)), calls)


def _input(features: int, sizes: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (*sizes[:2], features), jnp.bfloat16)


def gemma_layers(implementation: Any) -> Iterator[Layer]:
    """Gemma 2's global and sliding layers; the einsum is all that the project has."""
    gemma: Any = importlib.import_module("gemma.gm.nn._modules")
    adapter: Any = importlib.import_module("jax_fa3.integrations.gemma")
    b, t, n, k, h = layer_projects.CAP_SIZES
    x = _input(GEMMA_FEATURES, layer_projects.CAP_SIZES)
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    options: dict[str, Any] = {"num_heads": n, "num_kv_heads": k, "head_dim": h}
    options |= {"features": GEMMA_FEATURES, "query_pre_attn_scalar": h**-0.5}
    options |= {"attn_logits_soft_cap": GEMMA_CAP}

    def call(layer: Any, context: Callable[[], Any], params: Any, x: Any) -> Any:
        with context():
            mask = jnp.broadcast_to(jnp.tri(t, dtype=bool), (b, t, t))
            return layer.apply(params, x, positions, None, mask)[1]

    ours = functools.partial(adapter.attention, implementation=implementation)
    window = {"sliding_window_size": t // 4}
    for name, kind, more in (("global", "GLOBAL", {}), ("sliding", "LOCAL_SLIDING", window)):
        layer = gemma.Attention(attn_type=gemma.AttentionType[kind], **options, **more)
        shapes = jax.eval_shape(layer.init, jax.random.key(1), x, positions, None, _mask(b, t))
        params = jax.tree.map(_weights, shapes)
        calls = {OURS: functools.partial(call, layer, ours)}
        calls |= {DEFAULT: functools.partial(call, layer, contextlib.nullcontext)}
        yield Layer(f"Gemma 2, {name}", (params, x), calls)


def _mask(b: int, t: int) -> Any:
    return jax.ShapeDtypeStruct((b, t, t), jnp.bool)


def _weights(of: Any) -> jax.Array:
    """Normal, so that scores have a variance of about 1."""
    return jax.random.normal(jax.random.key(2), of.shape, jnp.bfloat16) * of.shape[-2] ** -0.5


def tunix_layers(implementation: Any) -> Iterator[Layer]:
    """Qwen 3; its einsum is what runs on GPUs."""
    qwen3: Any = importlib.import_module("tunix.models.qwen3.model")
    nnx: Any = importlib.import_module("flax.nnx")
    adapter: Any = importlib.import_module("jax_fa3.integrations.tunix")
    adapter.install(implementation=implementation)
    b, t, n, k, h = layer_projects.SIZES
    x = _input(QWEN_FEATURES, layer_projects.SIZES)
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[:1], (1, 1)), ("fsdp", "tp"))
    sizes: dict[str, Any] = {"num_layers": 1, "vocab_size": 32, "hidden_dim": 32}
    sizes |= {"embed_dim": QWEN_FEATURES, "num_heads": n, "num_kv_heads": k, "head_dim": h}
    sizes |= {"rope_theta": 1_000_000, "norm_eps": 1e-6}
    sizes |= dict.fromkeys(("dtype", "param_dtype"), jnp.bfloat16)

    def made(flash: bool) -> Any:
        config = qwen3.ModelConfig(use_flash_attention=flash, **sizes)
        with mesh:
            return nnx.split(qwen3.Attention(config, rngs=nnx.Rngs(0)))

    def call(graph: Any, weights: Any, x: Any) -> Any:
        with mesh:
            mask = jnp.broadcast_to(jnp.tri(t, dtype=bool), (b, t, t))
            return nnx.merge(graph, weights)(x, positions, None, mask)[1]

    (theirs, weights), (ours, _) = made(False), made(True)
    calls = {OURS: functools.partial(call, ours), DEFAULT: functools.partial(call, theirs)}
    yield Layer("Tunix, Qwen 3", (weights, x), calls)


PROJECTS = {"Equinox": equinox_layers, "Gemma": gemma_layers, "Tunix": tunix_layers}
