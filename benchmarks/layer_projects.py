"""For layers.py: one layer's attention in each project, by what it uses by default on a GPU and by its
adapter, as functions of query, key and value. (layer_whole.py has those that do not part from their
projections.)"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3

SIZES = 2, 4096, 32, 8, 128  # [B, T, N, K, H]: Llama 3 8B's heads
CAP_SIZES = 2, 4096, 16, 8, 256  # Gemma 2's
FLUX_SIZES = 1, 4608, 24, 24, 128  # an image of 1024 x 1024 and 512 tokens of text
OURS, DEFAULT, CUDNN = "jax_fa3", "default", "cuDNN by jax.nn"


class Layer(NamedTuple):
    name: str
    arguments: tuple[Any, ...]  # pytrees of arrays
    contenders: dict[str, Callable[..., Any]]  # who computes it from them, the output first


def tensors(sizes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Query, key and value in bf16."""
    b, t, n, k, h = sizes
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(b, t, heads, h) for heads in (n, k, k)]
    return tuple(jax.random.normal(*x, jnp.bfloat16) for x in zip(keys, shapes, strict=True))


def _cudnn(implementation: Any, **options: Any) -> Callable[..., Any]:
    """On a GPU; elsewhere XLA's."""
    by = "cudnn" if implementation == "fa3" else "xla"
    return functools.partial(jax.nn.dot_product_attention, implementation=by, **options)


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
        yield Layer(f"tokamax, {name}", tensors(sizes), {OURS: ours, DEFAULT: call})


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

        calls = {OURS: _scaled(ours), DEFAULT: _scaled(default)}
        yield Layer(f"MaxText, {name}", tensors(SIZES), calls)


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

    contenders = {OURS: functools.partial(call, ours=True)}
    contenders |= {DEFAULT: functools.partial(call, ours=False)}
    contenders |= {CUDNN: _cudnn(implementation, is_causal=True)}
    yield Layer("Levanter, causal", tensors(SIZES), contenders)


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

        calls = {OURS: ours, DEFAULT: default}
        yield Layer(f"Flax, {api}, causal", tensors((b, t, n, n, h)), calls)


def easydel_layers(implementation: Any) -> Iterator[Layer]:
    """What its configuration says by default, "vanilla", which is plain JAX, and "sdpa", which "auto" means
    on a GPU: cuDNN by jax.nn. (Set ENABLE_DISTRIBUTED_INIT=0 where EasyDeL takes a machine for a cluster.)"""
    operations: Any = importlib.import_module("easydel.operations")
    adapter: Any = importlib.import_module("jax_fa3.integrations.easydel")
    adapter.install(implementation=implementation)
    platform = "triton" if jax.default_backend() == "gpu" else "jax"  # as its configuration says
    axes = "dp", "fsdp", "ep", "tp", "sp"
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[:1], (1,) * len(axes)), axes)

    def call(mechanism: str, q: Any, k: Any, v: Any) -> Any:
        with mesh:
            metadata = operations.OperationMetadata(
                runtime_dtype=jnp.bfloat16, runtime_softmax_dtype=jnp.float32, platform=platform
            )
            operation = operations.OperationRegistry.create(mechanism, metadata)
            return operation(query=q, key=k, value=v, causal=True).attention_outputs

    ours = functools.partial(call, adapter.MECHANISM)
    for mechanism in ("vanilla", "sdpa"):
        calls = {OURS: ours, DEFAULT: functools.partial(call, mechanism)}
        yield Layer(f'EasyDeL, causal, "{mechanism}"', tensors(SIZES), calls)


def axlearn_layers(implementation: Any) -> Iterator[Layer]:
    """Its FlashAttention takes cuDNN for causal masks on a GPU, by the call that jax.nn makes: jax.nn
    makes it here."""
    utils: Any = importlib.import_module("axlearn.common.flash_attention.utils")
    biases: Any = importlib.import_module("axlearn.common.attention_bias")
    adapter: Any = importlib.import_module("jax_fa3.integrations.axlearn")
    adapter.install(implementation=implementation, device="sm_90")
    first = utils.BACKENDS["gpu"][0].default_config()

    def ours(q: Any, k: Any, v: Any) -> Any:
        positions = jnp.arange(q.shape[1])[None]
        bias = biases.CausalAttentionBias(target_positions=positions, source_positions=positions)
        op = first.set(softmax_scale=q.shape[-1] ** -0.5).instantiate()
        batch = {"query": q, "key": k, "value": v, "bias": bias}
        if not op.is_supported(batch, None):
            raise NotImplementedError("AXLearn would take its next kernel")
        return op(batch)

    calls = {OURS: ours, DEFAULT: _cudnn(implementation, is_causal=True)}
    yield Layer("AXLearn, causal", tensors(SIZES), calls)


def maxdiffusion_layers(implementation: Any) -> Iterator[Layer]:
    """Its "dot_product", as its layers call it: what it has for GPUs besides, "cudnn_flash_te", needs
    TransformerEngine, and cuDNN stands for it."""
    module: Any = importlib.import_module("maxdiffusion.models.attention_flax")
    adapter: Any = importlib.import_module("jax_fa3.integrations.maxdiffusion")
    adapter.install(implementation=implementation)
    _, _, n, _, h = FLUX_SIZES
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[:1], (1, 1)), ("data", "tensor"))
    options: dict[str, Any] = {"heads": n, "dim_head": h, "scale": h**-0.5, "dtype": jnp.bfloat16}
    options |= dict.fromkeys(("axis_names_q", "axis_names_kv"), (None,) * 4)
    options |= {"mesh": mesh, "split_head_dim": True, "float32_qk_product": False}
    options |= {"use_memory_efficient_attention": False, "flash_min_seq_length": 0}
    options |= {"flash_block_sizes": None, "dpa_layer": None}

    def call(kernel: str, *arrays: Any) -> Any:
        joined = (x.reshape(*x.shape[:2], -1) for x in arrays)
        out = module._apply_attention(*joined, attention_kernel=kernel, **options)
        return out.reshape(arrays[0].shape)

    contenders = {OURS: functools.partial(call, adapter.KERNEL)}
    contenders |= {DEFAULT: functools.partial(call, "dot_product"), CUDNN: _cudnn(implementation)}
    yield Layer("MaxDiffusion, Flux", tensors(FLUX_SIZES), contenders)


PROJECTS = {
    "tokamax": tokamax_layers,
    "MaxText": maxtext_layers,
    "Levanter": levanter_layers,
    "EasyDeL": easydel_layers,
    "AXLearn": axlearn_layers,
    "MaxDiffusion": maxdiffusion_layers,
    "Flax": flax_layers,
}
