"""For layers.py: one layer's attention in each project, by what it uses by default on a GPU and by its
adapter."""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3

SIZES = 2, 4096, 32, 8, 128  # [B, T, N, K, H]: Llama 3 8B's heads
CAP_SIZES = 2, 4096, 16, 8, 256  # Gemma 2's
OURS, DEFAULT = "jax_fa3", "default"

# What it is called, its sizes, and who computes it from query, key and value.
Layer = tuple[str, tuple[int, ...], dict[str, Callable[..., Any]]]


def _documents(length: int) -> jax.Array:
    """Ids [T] of four documents, from 1 on: 0 is padding."""
    ends = np.cumsum([length // 4, length // 2, length // 8])
    return jnp.asarray(1 + np.searchsorted(ends, np.arange(length), side="right"))


def tokamax_layers(implementation: Any) -> Iterator[Layer]:
    tokamax: Any = importlib.import_module("tokamax")
    adapter: Any = importlib.import_module("jax_fa3.integrations.tokamax")
    cases: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("causal", SIZES, {}),
        ("causal, window of 1024", SIZES, {"local_window_size": (1023, 0)}),
        ("causal, soft cap, head dim 256", CAP_SIZES, {"logits_soft_cap": 50.0}),
    )
    for name, sizes, options in cases:
        call = functools.partial(tokamax.dot_product_attention, is_causal=True, **options)
        ours = functools.partial(call, implementation=[adapter.Attention(implementation)])
        yield f"tokamax, {name}", sizes, {OURS: ours, DEFAULT: call}


def maxtext_layers(implementation: Any) -> Iterator[Layer]:
    """What its AttentionOp calls on a GPU with attention=autoselected: tokamax's Triton kernel, documents
    as a dense mask. (MaxText scales query before.)"""
    base: Any = importlib.import_module("tokamax._src.ops.attention.base")
    triton: Any = importlib.import_module("tokamax._src.ops.attention.pallas_triton")
    kernel = triton.PallasTritonFlashAttention()

    for name in ("causal", "causal, packed"):

        def default(q: Any, k: Any, v: Any, packed: bool = "packed" in name) -> Any:
            mask = base.Mask(is_causal=True)
            if packed:
                ids = _documents(q.shape[1])
                mask = mask & base.Mask((ids[:, None] == ids)[None, None].repeat(q.shape[0], 0))
            return kernel(q, k, v, logits_scale=1.0, mask=mask)

        def ours(q: Any, k: Any, v: Any, packed: bool = "packed" in name) -> Any:
            ids = jnp.tile(_documents(q.shape[1]), (q.shape[0], 1))
            given: Any = {"query_segment_ids": ids, "key_value_segment_ids": ids}
            masks = given | {"padding_segment_id": 0} if packed else {}
            return jax_fa3.dot_product_attention(
                q, k, v, is_causal=True, scale=1.0, implementation=implementation, **masks
            )

        yield f"MaxText, {name}", SIZES, {OURS: _scaled(ours), DEFAULT: _scaled(default)}


def _scaled(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, v: call(q * q.shape[-1] ** -0.5, k, v)


def levanter_layers(implementation: Any) -> Iterator[Layer]:
    """Its default without TransformerEngine, which it would call if it were there."""
    levanter: Any = importlib.import_module("levanter.layers.attention")
    hax: Any = importlib.import_module("haliax")
    adapter: Any = importlib.import_module("jax_fa3.integrations.levanter")
    original = levanter._te_flash_attention

    def call(q: Any, k: Any, v: Any, ours: bool) -> Any:
        b, t, n, h = q.shape
        kv = k.shape[2]
        B, Q, S, K, G, D = hax.make_axes(b=b, q=t, k=t, kv=kv, g=n // kv, d=h)
        query = hax.named(q.reshape(b, t, kv, n // kv, h), (B, Q, K, G, D))
        key, value = (hax.named(x, (B, S, K, D)) for x in (k, v))
        options = {"attn_backend": levanter.AttentionBackend("nvte")} if ours else {}
        levanter._te_flash_attention = original
        if ours:
            adapter.install(implementation=implementation)
        mask = levanter.AttentionMask.causal()
        out = levanter.dot_product_attention(Q, S, D, query, key, value, mask=mask, **options)
        return out.rearrange((B, Q, K, G, D)).array.reshape(b, t, n, h)

    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    contenders = {OURS: functools.partial(call, ours=True)}
    contenders |= {DEFAULT: functools.partial(call, ours=False)}
    contenders |= {"cuDNN by jax.nn": cudnn} if implementation == "fa3" else {}
    yield "Levanter, causal", SIZES, contenders


def flax_layers(implementation: Any) -> Iterator[Layer]:
    """What a layer of either API calls if no attention_fn is given, of as many key/value heads as query
    heads: its layers have no others."""
    b, t, n, _, h = SIZES
    make: Any = importlib.import_module("jax_fa3.flax").make_attention_fn
    ours = make(is_causal=True, implementation=implementation)
    for api in ("linen", "nnx"):
        module: Any = importlib.import_module(f"flax.{api}")

        def default(q: Any, k: Any, v: Any, module: Any = module) -> Any:
            mask = module.make_causal_mask(jnp.ones(q.shape[:2]), dtype=bool)
            return module.dot_product_attention(q, k, v, mask=mask)

        yield f"Flax, {api}, causal", (b, t, n, n, h), {OURS: ours, DEFAULT: default}


def equinox_layers(implementation: Any) -> Iterator[Layer]:
    """A MultiheadAttention in bf16, of a batch and with its projections: it does not part from them."""
    equinox: Any = importlib.import_module("equinox")
    adapter: Any = importlib.import_module("jax_fa3.integrations.equinox")
    b, t, n, _, h = SIZES
    layer = equinox.nn.MultiheadAttention(n, n * h, dtype=jnp.bfloat16, key=jax.random.key(1))

    def of_batch(call: Callable[..., Any], *arrays: Any) -> Any:
        return jax.vmap(call)(*(x.reshape(*x.shape[:2], -1) for x in arrays))

    def default(q: Any, k: Any, v: Any) -> Any:
        return layer(q, k, v, jnp.tri(t, dtype=bool))

    ours = functools.partial(
        adapter.multihead_attention, layer, is_causal=True, implementation=implementation
    )
    calls = {OURS: functools.partial(of_batch, ours), DEFAULT: functools.partial(of_batch, default)}
    yield "Equinox, causal", (b, t, n, n, h), calls


PROJECTS = {
    "tokamax": tokamax_layers,
    "MaxText": maxtext_layers,
    "Levanter": levanter_layers,
    "Flax": flax_layers,
    "Equinox": equinox_layers,
}
