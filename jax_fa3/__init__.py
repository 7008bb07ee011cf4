"""FlashAttention-3 for JAX on Hopper GPUs; the same function in plain JAX everywhere else."""

from jax.export import DisabledSafetyCheck as _DisabledSafetyCheck

from . import _ffi, _targets, context_parallel
from ._attention import dot_product_attention, qkv_dot_product_attention
from ._forward_mode import RESIDUAL_NAMES
from ._mask import key_intervals
from ._relative_bias import t5_relative_bias
from ._sharding import own_kv_heads
from ._supported import is_supported

__all__ = [
    "DISABLE_JAX_EXPORT_CHECKS",
    "RESIDUAL_NAMES",
    "context_parallel",
    "dot_product_attention",
    "is_supported",
    "key_intervals",
    "own_kv_heads",
    "qkv_dot_product_attention",
    "t5_relative_bias",
]
__version__ = "0.1.0"

# For jax.export.export(..., disabled_checks=jax_fa3.DISABLE_JAX_EXPORT_CHECKS), which otherwise
# refuses custom calls that are not JAX's own.
DISABLE_JAX_EXPORT_CHECKS = tuple(map(_DisabledSafetyCheck.custom_call, _targets.TARGETS))

_ffi.register()
