"""A dense mask where the kernels do not take it as bits (_mask_bits.py): beside a bias, of wide heads.

If each row of it sees one interval of keys, it is that interval; any other is read by the kernels as a
bias of 0 and -inf is, between the first and the last key that a row sees.

Which it is, is known at run time: each device looks at its own part of the mask, once. All batch entries
that a device has go one way, under vmap too, so only one of the two ever runs. What the kernels cannot
take beside a bias is left to plain JAX.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _bias, _mask_bits, _xla
from ._broken import marked
from ._mask import intersect
from ._operands import PER_HEAD, Operands, Rows
from ._problem import Config, Masks
from ._varying import vary_together

Function = Callable[..., tuple[Array, ...]]


def intervals(visible: Array) -> tuple[Array, Array, Array]:
    """The keys that each row of bool [..., S] sees, if they are one interval.

    Returns:
        begin, end: int32 [...]; 0, 0 where a row sees none.
        broken: bool [...], rows that see several intervals.
    """
    length = visible.shape[-1]
    keys = jnp.arange(length, dtype=jnp.int32)
    # Of the same elements, so XLA reads them once for all three.
    begin = jnp.where(visible, keys, length).min(-1, initial=length)
    end = jnp.where(visible, keys + 1, 0).max(-1, initial=0)
    count = visible.sum(-1, dtype=jnp.int32)
    broken = (count > 0) & (count != end - begin)
    return jnp.where(count > 0, begin, 0), end, broken


def taken(implementation: Any, kernel: Function, plain: Function) -> tuple[Function, Function]:
    """Both, for operands with a dense mask. "fa3" never falls back."""
    return by_intervals(kernel, None if implementation == "fa3" else plain), plain


@functools.cache
def by_intervals(kernel: Function, plain: Function | None, takes_dense: bool = True) -> Function:
    """kernel(config, operands, masks, ...) of operands with a dense mask, which it takes as bits; if it does
    not, without the mask where intervals say the same. Where they do not, and it takes no bias, it is plain;
    if that is None, the rows that see several intervals are broken and become NaN.

    Args:
        takes_dense: whether the kernel takes bits where _mask_bits lets it, and a bias where _bias does.
    """
    return functools.partial(_by_intervals, kernel, plain, takes_dense)


def takes_bits(operands: Operands) -> bool:
    return operands.bias is None and _mask_bits.refusal(operands) is None


def takes_bias(config: Config, operands: Operands) -> bool:
    """Whether the kernels take the mask as a bias, where they do not take bits."""
    by_distance = operands.alibi_slopes, operands.relative_bias
    return all(x is None for x in by_distance) and _bias.refusal(config, operands.sizes) is None


def _by_intervals(
    kernel: Function,
    plain: Function | None,
    takes_dense: bool,
    config: Config,
    operands: Operands,
    masks: Masks,
    *rest: Any,
) -> tuple[Array, ...]:
    if takes_dense and takes_bits(operands):
        return kernel(config, operands, masks, *rest)
    assert operands.mask is not None
    takes_dense = takes_dense and takes_bias(config, operands)
    operands = dataclasses.replace(
        operands, mask=_mask_bits.as_bool(operands.mask, operands.sizes.key_length)
    )
    begin, end, broken = _rows(operands)
    hull = begin, end
    if masks.key_begin is not None or masks.key_end is not None:
        before = jnp.zeros_like(begin), jnp.full_like(end, operands.sizes.key_length)
        given = zip((masks.key_begin, masks.key_end), before, strict=True)
        first, last = (y if x is None else x for x, y in given)
        hull = intersect(hull, (first, last))
        found = intersect(marked(broken, begin, end), (first, last))
    else:
        found = marked(broken, begin, end)
    found = masks._replace(key_begin=found[0], key_end=found[1])
    whole = dataclasses.replace(operands, mask=None)
    if takes_dense:
        other, masks = kernel, masks._replace(key_begin=hull[0], key_end=hull[1])
    elif plain is None:
        return kernel(config, whole, found, *rest)
    else:
        other = plain
    arguments = vary_together((operands, masks, whole, found, rest))

    def general(operands: Operands, masks: Masks, _: Any, __: Any, rest: Any) -> tuple[Array, ...]:
        return other(config, operands, masks, *rest)

    def fast(_: Any, __: Any, whole: Operands, found: Masks, rest: Any) -> tuple[Array, ...]:
        return kernel(config, whole, found, *rest)

    return lax.cond(broken.any(), general, fast, *arguments)


def _rows(operands: Operands) -> tuple[Array, Array, Array]:
    """`intervals` of the mask, [B, T] each; rows of which heads see different keys are broken, and begin
    and end are those of all heads."""
    assert operands.mask is not None
    mask, sizes = operands.mask, operands.sizes
    begin, end, broken = intervals(mask)  # [B or 1, N or 1, T or 1]
    if mask.shape[3] == 1:
        end = end * sizes.key_length
    differ = (begin != begin[:, :1]) | (end != end[:, :1])
    broken = (broken | differ).any(1)
    shape = sizes.batch, sizes.query_length
    first = jnp.where(begin < end, begin, sizes.key_length).min(1)
    last = end.max(1)
    first = jnp.where(first < last, first, 0)
    rows = jnp.broadcast_to(first, shape), jnp.broadcast_to(last, shape)
    return *rows, jnp.broadcast_to(broken, shape)


def plain_backward(
    config: Config, operands: Operands, masks: Masks, rows: Rows, *, with_dbias: bool = True
) -> tuple[Array, ...]:
    """The gradients of operands by JAX's derivative, for any mask, and with dropout; those of sinks, slopes
    and relative_bias of each batch entry. with_dbias: of the terms of the scores, too."""
    others: dict[str, Any] = {"mask": operands.mask, "dropout": operands.dropout}
    if not with_dbias:
        others |= {name: getattr(operands, name) for name in _bias.TERMS}
    tensors = dataclasses.replace(operands, **dict.fromkeys(others))
    for name in (*PER_HEAD, "relative_bias"):
        if (x := getattr(tensors, name)) is not None:
            of_each = jnp.broadcast_to(x, (operands.sizes.batch, *x.shape[1:]))
            tensors = dataclasses.replace(tensors, **{name: of_each})

    def forward(tensors: Operands) -> tuple[Array, Array]:
        return _xla.attention(config, dataclasses.replace(tensors, **others), masks)

    (found,) = jax.vjp(forward, tensors)[1]((rows.dout, rows.whole_dlse()))
    return tuple(jax.tree.leaves(found))
