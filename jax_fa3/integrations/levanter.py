"""Levanter: its backend "nvte" (the default on GPUs) on these kernels, after `install()`."""

from __future__ import annotations

import functools
import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import Array

from .._attention import dot_product_attention
from .._problem import Implementation
from ._project import check_version, refuse, refuse_given


def install(
    *, implementation: Implementation | None = None, deterministic_backward: bool = False
) -> None:
    """Puts `jax_fa3.dot_product_attention` where Levanter's backend "nvte" calls TransformerEngine.

    Levanter has no registry, so this replaces levanter.layers.attention._te_flash_attention, on which
    its dot_product_attention, and with it every model of its, comes to call.

    Args: of `jax_fa3.dot_product_attention`.

    Levanter's results, but for rows with a negative segment id, which see nothing and give 0: causal
    masks with offsets, sliding windows (which Levanter's own call of TransformerEngine leaves out),
    windows to both sides, segment ids, soft cap, several head axes and batch axes. Scores are fp32
    whatever attention_dtype is; a narrower one than the arrays' is what they are cast to.

    Refused with NotImplementedError, at which Levanter takes its own implementation and warns, or
    raises if "nvte" was asked for by name: explicit masks, bias, dropout, value with another axis than
    Key. (Sinks it refuses before.)
    """
    check_version("marin-levanter", "0.2.227", "0.2.227")
    module: Any = importlib.import_module("levanter.layers.attention")
    options = {
        "implementation": implementation,
        "deterministic_backward": deterministic_backward,
    }

    original = inspect.unwrap(module._te_flash_attention)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def attend(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return _attend(module, options, SimpleNamespace(**call.arguments))

    module._te_flash_attention = attend


def _attend(levanter: Any, options: dict[str, Any], call: Any) -> Any:
    """Of the hook's arguments, by name. Its precision means nothing here: products of 16-bit numbers are
    exact, and summed in fp32."""
    QPos, KPos, Key, mask = call.QPos, call.KPos, call.Key, call.mask
    query, key, value = named = call.query, call.key, call.value
    refuse_given(bias=call.bias, dropout=0 if call.inference else call.dropout)
    if not (mask is None or isinstance(mask, levanter.AttentionMask)):
        raise refuse("mask", type(mask).__name__, "an AttentionMask")
    if query.resolve_axis(Key) not in value.axes:
        raise refuse("value", f"axes {value.axes}", f"{Key} among them")
    classes = levanter._bin_and_group_axes_by_function(*named, QPos, KPos, Key)
    q, k, v = (
        levanter._reshape_axes_for_bshd_bins(x, axes).array
        for x, axes in zip(named, classes, strict=True)
    )
    batch = tuple(classes[0]["B"])
    masks = (
        {}
        if mask is None
        else _masks(mask, batch, query.resolve_axis(QPos), key.resolve_axis(KPos))
    )
    out = dot_product_attention(
        *(x.astype(_narrower(q.dtype, call.attention_dtype)) for x in (q, k, v)),
        scale=call.scaling_factor,
        logits_soft_cap=call.logits_soft_cap,
        **masks,
        **options,
    )
    like = levanter.eqx.filter_eval_shape(
        levanter.simple_attention_with_dropout,
        *(QPos, KPos, Key, *named, mask),
        inference=True,
        attention_dtype=call.attention_dtype,
    )
    out = levanter.haliax.named(out, ("B", "S", "H", "D"))
    out = levanter._unflatten_bshd(out, classes[0], classes[2])
    return out.rearrange(like.axes).astype(like.dtype)


def _narrower(dtype: Any, attention_dtype: Any) -> Any:
    given = attention_dtype is not None
    narrow = given and jnp.dtype(attention_dtype).itemsize < jnp.dtype(dtype).itemsize
    return attention_dtype if narrow else dtype


def _masks(mask: Any, batch: tuple[Any, ...], QPos: Any, KPos: Any) -> dict[str, Any]:
    """The arguments that an AttentionMask, the conjunction of its fields, is here."""
    refuse_given(explicit_mask=mask.explicit_mask)
    count, arguments = 1, {}
    for axis in batch:
        count *= axis.size

    def spread(x: Any, *axes: Any) -> Array:
        """[B, ...] of a named array with some of these axes."""
        shape = [axis.size for axis in axes]
        return (
            x.broadcast_to((*batch, *axes)).rearrange((*batch, *axes)).array.reshape(count, *shape)
        )

    if mask.is_causal and mask.causal_offset is None:
        arguments["is_causal"] = True
    elif mask.is_causal:  # windows are not shifted by the offset
        arguments["key_end"] = spread(mask.causal_offset)[:, None] + jnp.arange(1, QPos.size + 1)
    sliding, radius = mask.sliding_window, mask.bidirectional_window
    sides = [] if sliding is None else [(sliding - 1, 0)]
    sides += [] if radius is None else [(radius, radius)]
    if sides:
        arguments["local_window_size"] = tuple(map(min, *sides, (QPos.size + KPos.size,) * 2))
    if mask.segment_ids is not None:
        ids, key_ids = mask.segment_ids
        ids, key_ids = ids.rename({QPos.name: QPos}), key_ids.rename({QPos.name: KPos})
        arguments["query_segment_ids"] = spread(ids, QPos)
        arguments["key_value_segment_ids"] = spread(key_ids, KPos)
    return arguments
