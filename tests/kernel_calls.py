"""The functions that make the custom calls of attention, of operands one by one."""

from typing import Any

import jax.numpy as jnp

from jax_fa3 import _ffi
from jax_fa3._operands import Operands, Rows
from jax_fa3._problem import Config, Masks
from jax_fa3.fp8 import _ffi as _fp8

# What stands beside query, key and value, by the names that the calls below have for it.
_OTHERS = {
    **{name: name for name in ("packed", "sinks", "bias", "mask", "dropout")},
    "slopes": "alibi_slopes",
    "table": "relative_bias",
}


def _operands(tensors: Any, options: dict[str, Any]) -> Operands:
    """Of these, and of those of the options that are operands, which are taken out of them."""
    others: Any = {name: options.pop(key, None) for key, name in _OTHERS.items()}
    return Operands(*tensors, **others)


def FORWARD(config: Config, *arrays: Any, **options: Any) -> Any:
    """_ffi.fwd of the arrays of operands, and masks."""
    *tensors, masks = arrays
    operands = _operands(tensors, options)
    return _ffi.fwd(config, operands, masks, **options)


def BACKWARD(config: Config, operands: Any, masks: Masks, *rows: Any, **options: Any) -> Any:
    return _ffi.bwd(config, operands, masks, Rows(*rows), **options)


def backward_of_three(config: Config, *arrays: Any, **options: Any) -> Any:
    """Of query, key, value, masks, and rows."""
    operands = _operands(arrays[:3], options)
    return BACKWARD(config, operands, *arrays[3:], **options)


def fp8_forward(config: Config) -> Any:
    return lambda *x: _fp8.fwd(config, jnp.dtype(jnp.bfloat16), *x)


def quantized(x: Any, transposed: bool = False, *others: Any) -> Any:
    """The others: signs, lengths, None, the mean."""
    return _fp8.quantize(transposed, _fp8.Unquantized(x, *(others or (None, None))))
