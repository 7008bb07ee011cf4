"""A stand-in for the parts of MaxDiffusion that its adapter touches: names, arguments and meanings of
AI-Hypercomputer/maxdiffusion's src/maxdiffusion/models/attention_flax.py at 00ac80e."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import stand_ins

KERNEL_REGISTRY: dict[str, Any] = {}


def register_kernel(name: str) -> Callable[[Any], Any]:
    def decorator(function: Any) -> Any:
        KERNEL_REGISTRY[name] = function
        return function

    return decorator


@register_kernel("dot_product")
def dot_product_kernel(q: Any, k: Any, v: Any, context: Any) -> Any:
    """Of [B, T, N * H], whose mask is a bias [B, 1, 1, K]; it knows nothing of `is_causal`."""
    assert context["split_head_dim"]
    heads, dim = context["heads"], context["dim_head"]
    query, key, value = (x.reshape(len(x), -1, heads, dim) for x in (q, k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * context["scale"]
    if context["attention_mask"] is not None:
        scores = scores + context["attention_mask"].astype(scores.dtype)
    weights = jax.nn.softmax(scores, axis=-1).astype(context["dtype"])
    out = jnp.einsum("bnts,bsnh->btnh", weights, value)
    return out.reshape(*out.shape[:2], -1)


def _apply_attention(
    query: Any,
    key: Any,
    value: Any,
    heads: int,
    dim_head: int,
    split_head_dim: bool,
    float32_qk_product: bool,
    attention_kernel: str,
    flash_min_seq_length: int,
    use_memory_efficient_attention: bool,
    scale: float,
    dtype: Any,
    mesh: Any,
    axis_names_q: Any,
    axis_names_kv: Any,
    flash_block_sizes: Any,
    dpa_layer: Any,
    mask_padding_tokens: bool = True,
    residual_checkpoint_name: str | None = None,
    attention_mask: Any = None,
    use_base2_exp: bool = False,
    use_experimental_scheduler: bool = False,
    ulysses_shards: int = -1,
    ulysses_attention_chunks: int = 1,
    is_causal: bool = False,
    preserve_asymmetric_block_sizes: bool = False,
    spatiotemporal_config: Any = None,
    spatiotemporal_shape: Any = None,
) -> Any:
    """What its layers call; a context is all of the arguments but five."""
    context = dict(locals())
    for name in ("query", "key", "value", "attention_kernel", "flash_min_seq_length"):
        del context[name]
    if attention_mask is not None:
        assert attention_mask.ndim == 2
        mask = attention_mask.astype(bool)
        if attention_kernel == "dot_product":
            mask = jnp.where(mask, 0.0, -10000.0).astype(dtype)[:, None, None]
        context["attention_mask"] = mask
    return KERNEL_REGISTRY[attention_kernel](query, key, value, context)


def maxdiffusion() -> Any:
    names = {
        "KERNEL_REGISTRY": KERNEL_REGISTRY,
        "register_kernel": register_kernel,
        "_apply_attention": _apply_attention,
    }
    return stand_ins.installed(
        "maxdiffusion", {"maxdiffusion.models.attention_flax": lambda: names}
    )
