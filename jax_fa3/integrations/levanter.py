"""Levanter: its backend "nvte" (the default on GPUs) on these kernels, after `install()`."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import math
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import Array

from .._attention import dot_product_attention
from .._problem import Implementation
from ._project import check_version, refuse


def install(
    *, implementation: Implementation | None = None, deterministic_backward: bool = False
) -> None:
    """Puts `jax_fa3.dot_product_attention` where Levanter's backend "nvte" calls TransformerEngine.

    Levanter has no registry, so this replaces levanter.layers.attention._te_flash_attention, on which
    its dot_product_attention, and with it every model of its, comes to call.

    Args: of `jax_fa3.dot_product_attention`.

    Levanter's results, but for rows with a negative segment id, which see nothing and give 0: causal
    masks with offsets, sliding windows (which Levanter's own call of TransformerEngine leaves out),
    windows to both sides, segment ids, explicit masks, bias, soft cap, dropout (not of the same
    weights), several head axes and batch axes. Scores are fp32 whatever attention_dtype is; a narrower
    one than the arrays' is what they are cast to.

    Refused with NotImplementedError, at which Levanter takes its own implementation and warns, or
    raises if "nvte" was asked for by name: value with another axis than Key. (Sinks it refuses before.)
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
    if query.resolve_axis(Key) not in value.axes:
        raise refuse("value", f"axes {value.axes}", f"{Key} among them")
    classes = levanter._bin_and_group_axes_by_function(*named, QPos, KPos, Key)
    q, k, v = (
        levanter._reshape_axes_for_bshd_bins(x, axes).array
        for x, axes in zip(named, classes, strict=True)
    )
    groups = tuple(classes[0]["B"]), tuple(classes[0]["H"])
    groups += (query.resolve_axis(QPos),), (key.resolve_axis(KPos),)
    arguments = {}
    if isinstance(mask, levanter.AttentionMask):
        arguments = _masks(mask, groups)
    elif mask is not None:
        arguments["mask"] = _by_score(mask, groups) != 0
    if call.bias is not None:
        arguments |= {"bias": _by_score(call.bias, groups), "soft_cap_last": True}
    if call.dropout and not call.inference:
        arguments |= {"dropout_rate": call.dropout, "dropout_key": call.prng}
    out = dot_product_attention(
        *(x.astype(_narrower(q.dtype, call.attention_dtype)) for x in (q, k, v)),
        scale=call.scaling_factor,
        logits_soft_cap=call.logits_soft_cap,
        **arguments,
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


def _by_score(x: Any, groups: tuple[Any, ...]) -> Array:
    """[1|B, 1|N, 1|T, 1|S] of a named array with some of the axes in these four groups."""
    given = [group if any(axis in x.axes for axis in group) else () for group in groups]
    shape = [math.prod(axis.size for axis in group) for group in given]
    return _array(x, *itertools.chain(*given)).reshape(shape)


def _array(x: Any, *axes: Any) -> Array:
    return x.broadcast_to(axes).rearrange(axes).array


def _masks(mask: Any, groups: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments that an AttentionMask, the conjunction of its fields, is here."""
    batch, _, (QPos,), (KPos,) = groups
    arguments: dict[str, Any] = {}

    def spread(x: Any, *axes: Any) -> Array:
        """[B, ...] of a named array with some of these axes."""
        shape = [axis.size for axis in axes]
        return _array(x, *batch, *axes).reshape(math.prod(axis.size for axis in batch), *shape)

    if mask.explicit_mask is not None:
        arguments["mask"] = _by_score(mask.explicit_mask, groups) != 0
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
