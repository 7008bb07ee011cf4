"""Which devices a program is lowered for, in a process that sees a Hopper GPU and other GPUs too.

At trace time that is not known: arrays may be committed to any device. Lowering knows it, but for the
mesh of explicit axes or of the argument `sharding`, which JAX lowers without its devices.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.interpreters import batching, mlir
from jax.sharding import Mesh

from ._guards import Primitive

_UNKNOWN = (
    "jax_fa3 runs this on XLA: this process has a Hopper GPU and other GPUs, and for which of them this "
    "is lowered is not known here: pass implementation='fa3' if it is Hopper GPUs alone, or 'xla'"
)


def is_hopper(device: Any) -> bool:
    return str(getattr(device, "compute_capability", None)) == "9.0"


def meant(arrays: Iterable[Any]) -> list[Any]:
    """The devices that an eager call of these arrays would run on, or a jitted one if nothing in it
    is committed to others."""
    for x in arrays:
        if isinstance(x, Array) and not isinstance(x, Tracer) and x.committed:
            return list(x.sharding.device_set)
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if default is None or isinstance(default, str):
        return jax.local_devices(backend=default)[:1]
    return [default]


def lowered_for() -> Array:
    """Whether the program is lowered for Hopper GPUs alone: a constant of the lowered program."""
    return _lowered_for.bind(jnp.zeros((), bool))


def _lower(ctx: mlir.LoweringRuleContext, _: Any) -> Any:
    axes: Any = ctx.module_context.axis_context
    devices = getattr(axes, "device_assignment", None)
    mesh = getattr(axes, "mesh", None)
    if isinstance(mesh, Mesh):
        devices = mesh.devices.flat
    if devices is None:
        warnings.warn(_UNKNOWN, stacklevel=2)
    return [mlir.ir_constant(np.bool_(devices is not None and all(map(is_hopper, devices))))]


_lowered_for = Primitive("jax_fa3_lowered_for_hopper")
_lowered_for.def_impl(lambda x: x)  # without jit: of no device is known that it is one
_lowered_for.def_abstract_eval(lambda x: x)
mlir.register_lowering(_lowered_for, _lower)
batching.defvectorized(_lowered_for)
