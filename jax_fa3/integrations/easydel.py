"""EasyDeL: `attn_mechanism="jax_fa3"`, an operation of its registry, after `install()`."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from .._attention import dot_product_attention
from .._problem import Implementation
from ._project import check_version, refuse, refuse_given

MECHANISM = "jax_fa3"  # of EasyDeL's key `attn_mechanism`
CHECKPOINT_NAME = "attn_output"  # by which EasyDeL's remat policies save attention


def install(
    *, implementation: Implementation | None = None, deterministic_backward: bool = False
) -> None:
    """Registers the attention mechanism "jax_fa3" with `easydel.operations.OperationRegistry`.

    Args: of `jax_fa3.dot_product_attention`.

    The results are those of EasyDeL's "vanilla", but for rows that see no key: they give 0. Causal
    masks, sliding windows, MaskInfo (segment ids as such, its other masks as dense ones), bias, soft
    cap, dropout (not of the same weights), and sinks, those of a head joined; sharded over batch and
    heads by EasyDeL's own rules, a split sequence is gathered. Scores and softmax are fp32. EasyDeL's remat policies that save "attn_output"
    save what the backward needs.

    The operation raises NotImplementedError, while it is traced, for bias beside mask_info (which
    EasyDeL's implementations read in different ways), cumulative lengths, unnormalized output, and
    paged caches.
    """
    check_version("easydel", "0.3.0", "0.3.0")
    operations: Any = importlib.import_module("easydel.operations")
    requirements: Any = importlib.import_module("easydel.operations.requirements")
    caching: Any = importlib.import_module("easydel.caching")
    options = {
        "implementation": implementation,
        "deterministic_backward": deterministic_backward,
        "checkpoint_name": CHECKPOINT_NAME,
    }

    class Attention(operations.OperationImpl):
        @classmethod
        def get_impl_name(cls) -> str:
            return MECHANISM

        @classmethod
        def get_requirements(cls, mode: Any = requirements.ExecutionMode.MIXED) -> Any:
            return requirements.OperationRequirements.create(
                name=MECHANISM,
                required_metadata=requirements.MetadataField.basic(),
                supported_cache=requirements.CacheType.TRANSFORMER | requirements.CacheType.HYBRID,
                cache_view_class=caching.TransformerCacheView,
            )

        def forward_native(self, query: Any, key: Any, value: Any, **arguments: Any) -> Any:
            out = _attend(self, options, (query, key, value), arguments)
            return operations.AttentionOutput(attention_outputs=out)

        forward_cpu = forward_gpu = forward_cuda = forward_native
        forward_tpu = forward_rocm = forward_native

    operations.OperationRegistry.register(Attention)


# Those of EasyDeL's arguments that are looked at. Others are about its own kernels.
_DEFAULTS: dict[str, Any] = {
    "mask_info": None,
    "bias": None,
    "init_bias": None,
    "deterministic": True,
    "softmax_aux": None,
    "softmax_scale": None,
    "logits_soft_cap": None,
    "dropout_prob": 0.0,
    "dropout_rng": None,
    "causal": False,
    "sliding_window": None,
    "normalize_output": True,
    "cum_seqlens_q": None,
    "cum_seqlens_k": None,
}


def _attend(
    self: Any, options: dict[str, Any], tensors: tuple[Array, ...], arguments: dict[str, Any]
) -> Array:
    call, (query, key, _) = SimpleNamespace(**_DEFAULTS | arguments), tensors
    refuse_given(
        cum_seqlens_q=call.cum_seqlens_q,
        cum_seqlens_k=call.cum_seqlens_k,
        unnormalized_output=not call.normalize_output,
    )
    bias, mask_info = call.bias, call.mask_info
    if mask_info is None and bias is None and call.init_bias is not None:
        bias = call.init_bias()
    if mask_info is not None and bias is not None:
        raise refuse("bias", "it beside mask_info", "one of the two")
    aux = call.softmax_aux
    return dot_product_attention(
        *tensors,
        bias=bias,
        scale=call.softmax_scale,
        # One row decodes: its cache's mask says what it sees.
        is_causal=call.causal and query.shape[1] != 1,
        local_window_size=call.sliding_window,
        logits_soft_cap=call.logits_soft_cap,
        sinks=None if aux is None else _joined_sinks(aux, query, key),
        compute_dtype=self.metadata.runtime_dtype,
        sharding=_sharding(self, query),
        dropout_rate=0 if call.deterministic else call.dropout_prob,
        dropout_key=None if call.deterministic else call.dropout_rng,
        **_masks(mask_info, query.shape[1], key.shape[1]),
        **options,
    )


def _masks(mask_info: Any, rows: int, keys: int) -> dict[str, Any]:
    """A mask that was made of segment ids is them; what a MaskInfo made of a mask it says of segments
    is less than the mask."""
    if mask_info is None:
        return {}
    if mask_info._attention_mask is None:
        ids = mask_info.q_segment_ids, mask_info.kv_segment_ids
        return dict(zip(("query_segment_ids", "key_value_segment_ids"), ids, strict=True))
    return {"mask": mask_info.attention_mask[..., :rows, :keys] != 0}


def _joined_sinks(aux: Array, query: Array, key: Array) -> Array:
    """[N], the log-sum-exp of each head's sinks: of [N or K or 1, sinks]; of [N] or [K], one of each
    head; or of [sinks], the same for all heads."""
    heads, kv_heads = query.shape[2], key.shape[2]
    if aux.ndim == 1:
        aux = aux[:, None] if aux.shape[0] in (heads, kv_heads) else aux[None]
    joined = jax.nn.logsumexp(aux.astype(jnp.float32), axis=-1)
    repeats = heads // joined.shape[0]
    return jnp.repeat(joined, repeats, total_repeat_length=heads)


def _sharding(self: Any, query: Array) -> NamedSharding | None:
    """Of batch and heads, by EasyDeL's rules, where they divide the mesh."""
    mesh = self.metadata.mesh
    if mesh is None or mesh.size == 1:
        return None
    rules = self.metadata.get_shardings(self.get_mode(query=query, BTHD=True), layout="bthd")
    spec = self.create_stable_sharding(rules.query, [0, 2], tensor=query)
    return NamedSharding(mesh, PartitionSpec(*spec))
