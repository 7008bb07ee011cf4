"""How each rival runs a point, as a plain function of query, key and value; or why it does not."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .points import Point


class Refused(Exception):
    """A contender does not take this point; the text says why."""


class Attention(NamedTuple):
    """fn(query, key, value, *masks) -> out, and what its inputs must look like."""

    fn: Callable[..., jax.Array]
    masks: tuple[jax.Array, ...] = ()
    dtype: str | None = None  # None: the point's
    query_scale: float = 1.0  # multiplied into query beforehand, where a contender knows no scale
    derivative: bool = False  # the backward has that of the masks, too


def window(point: Point) -> tuple[int, int] | None:
    """As jax.nn and FlashAttention count: keys to the left and to the right besides the row's own."""
    return None if point.window is None else (point.window, 0)


def _installed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Refused(f"not installed ({error})") from error


def _cudnn(point: Point) -> Attention:
    if point.documents:
        raise Refused("jax.nn has no packed documents")
    if point.head_dim != point.head_dim_v:
        return _cudnn_two_head_dims(point)
    return Attention(
        partial(
            jax.nn.dot_product_attention,
            is_causal=point.is_causal,
            local_window_size=window(point),
            implementation="cudnn",
        )
    )


def _cudnn_two_head_dims(point: Point) -> Attention:
    """JAX's private API: jax.nn wants value to have query's head dim."""
    if point.window is not None:
        raise Refused("no window with a value head dim of its own")
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    attention: Any = partial(
        cudnn.dot_product_attention,
        scale=point.head_dim**-0.5,
        mask_type=cudnn.MaskType.CAUSAL if point.is_causal else cudnn.MaskType.NO_MASK,
    )
    return Attention(attention)


def _pallas(point: Point) -> Attention:
    if point.documents or point.window is not None:
        raise Refused("no masks other than causal")
    if point.head_dim != point.head_dim_v:
        raise Refused("no value head dim of its own")
    if point.pass_name != "fwd":
        raise Refused("its backward has no causal mask")
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    # Two warpgroups of 64 rows; the widest key block whose scores, probabilities and output stay in
    # their registers, and whose two stages fit into shared memory.
    config = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=128 if point.head_dim <= 128 else 64,
        max_concurrent_steps=2,
        causal=point.is_causal,
    )

    def attention(query, key, value) -> Any:
        return attention_mgpu.attention(query, key, value, config=config)

    return Attention(attention, dtype="float16", query_scale=point.head_dim**-0.5)


def _bottom_right(point: Point) -> dict[str, Any]:
    """The mask as FlashAttention's own functions take it, aligned to the last row and key."""
    if point.keys != point.seqlen and point.mask != "full":
        raise Refused("its masks are aligned to the last key, not to the first")
    # A window with nothing to its right is causal.
    causal = point.is_causal and point.window is None
    return {"is_causal": causal, "window_size": window(point) or (-1, -1)}


def _flash_attn3_jax(point: Point) -> Attention:
    if (point.head_dim, point.head_dim_v) != (128, 128):
        raise Refused("head dim 128 only")
    if point.documents:
        raise Refused("packed documents need another layout")
    mask = _bottom_right(point)
    return Attention(partial(_installed("flash_attn3_jax").flash_mha, **mask))


def _dew(point: Point) -> Attention:
    """FlashAttention-3's own kernels, from the package dew-flash-attn-cu13."""
    if point.head_dim != point.head_dim_v:
        raise Refused("no value head dim of its own")
    mask = _bottom_right(point)
    package = _installed("dew_flash_attn")
    if not point.documents:
        return Attention(partial(package.flash_mha, **mask))
    lengths = point.documents * point.batch
    starts = jnp.asarray(np.cumsum((0, *lengths)), jnp.int32)

    def attention(query, key, value, starts):
        rows = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
        return package.flash_mha_varlen(*rows, starts, max(lengths), **mask).reshape(query.shape)

    return Attention(attention, (starts,))


ATTENTIONS: dict[str, Callable[[Point], Attention]] = {
    "cudnn": _cudnn,
    "pallas": _pallas,
    "flash-attn3-jax": _flash_attn3_jax,
    "dew": _dew,
}
