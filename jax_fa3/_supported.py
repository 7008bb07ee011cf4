"""Whether the kernels would run a call."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike

from . import _batch_axes, _dispatch, _tensors
from ._checks import wrong


def is_supported(
    query: ArrayLike | jax.ShapeDtypeStruct,
    key: ArrayLike | jax.ShapeDtypeStruct,
    value: ArrayLike | jax.ShapeDtypeStruct,
    bias: ArrayLike | jax.ShapeDtypeStruct | None = None,
    mask: ArrayLike | jax.ShapeDtypeStruct | None = None,
    *,
    device: str | None = None,
    **options: Any,
) -> str | None:
    """None if the kernels run `dot_product_attention` of these arguments here, else why not.

    Args:
        device: "sm_90", a Hopper GPU of any machine: the arguments alone count, and this machine's
            devices do not; of an install without kernels those of the default build are meant. None
            is this machine: if it has no CUDA device, that is the reason, though lowering for CUDA
            with "fa3" may work all the same.
        others: those of `dot_product_attention`; any array may be a jax.ShapeDtypeStruct.

    Raises ValueError for another device.
    """
    if device not in (None, "sm_90"):
        raise wrong("device", repr(device), "None or 'sm_90'")
    arguments = dict(options, query=query, key=key, value=value, bias=bias, mask=mask)
    shapes = {k: x for k, x in arguments.items() if isinstance(x, jax.ShapeDtypeStruct)}

    def check(tracers: dict[str, Array]) -> None:
        known: dict[str, Any] = arguments | tracers
        tensors = {k: known.pop(k) for k in ("query", "key", "value")}
        reason = _dispatch.refusal(_batch_axes.parse(_tensors.separate, tensors, 3, **known))
        if reason is not None:
            raise NotImplementedError(reason)

    try:
        jax.eval_shape(check, shapes)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    if device is not None:
        return None
    if not _dispatch.compute_capabilities():
        return "device: got no CUDA device, wanted an NVIDIA Hopper GPU (sm_90)"
    return _dispatch.machine_refusal() or _dispatch.refusal_of_devices((query, key, value))
