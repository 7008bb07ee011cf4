"""Identities that refuse a use which cannot work, with a message that says what to do instead.

JAX's own errors would say "no lowering rule", or name custom_vjp, which the user never wrote.
"""

from __future__ import annotations

from typing import Any, NoReturn

from jax import lax
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh

# Its public name is jax.extend.core.Primitive, but jax.extend imports Pallas, which takes longer
# than all of jax_fa3.
Primitive = type(lax.add_p)

_ONLY_REVERSE = (
    "jax_fa3's kernels have first derivatives only; jax_fa3.fp8 and jax_fa3.context_parallel have first "
    "derivatives in reverse mode only (jax.grad, jax.vjp): for second derivatives, and there for forward "
    "mode (jax.jvp, jax.jacfwd, jax.linearize), use implementation='xla', outside jax_fa3.fp8 and "
    "jax_fa3.context_parallel"
)
_QUANTIZED = (
    "jax_fa3.fp8: what is quantized has no derivative: differentiate "
    "jax_fa3.fp8.dot_product_attention, which takes 16-bit arrays, or use jax.lax.stop_gradient"
)
_CACHE = (
    "jax_fa3.kv_cache has no derivatives: differentiate jax_fa3.dot_product_attention, which takes the "
    "same masks, or use jax.lax.stop_gradient"
)
_NO_EXPORT = (
    "jax_fa3: a program over several devices with automatic mesh axes cannot be exported, for how it "
    "is split is decided only when it is compiled: pass sharding=NamedSharding(mesh, spec of query), "
    "use explicit axes, or call inside jax.shard_map"
)
_NO_DEVICES = (
    "jax_fa3: automatic mesh axes beside manual or explicit ones need a mesh with devices: pass "
    "sharding=, or use jax.set_mesh, or jax.shard_map(mesh=) with a jax.sharding.Mesh"
)


def _identity(name: str) -> Any:
    primitive = Primitive(f"jax_fa3_{name}")
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, lambda ctx, x: [x])
    batching.defvectorized(primitive)
    return primitive


def _refuse_derivative(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError(_ONLY_REVERSE)


def _refuse_derivative_of_quantized(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError(_QUANTIZED)


def _refuse_derivative_of_cache(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError(_CACHE)


def _refuse_lowering(ctx: mlir.LoweringRuleContext, *_: Any) -> NoReturn:
    raise NotImplementedError(
        "implementation='fa3' needs an NVIDIA Hopper GPU (sm_90); this is being lowered for platform "
        f"{' and '.join(ctx.module_context.platforms)}: use implementation='xla' or None"
    )


def _check_partitioning(ctx: mlir.LoweringRuleContext, x: Any) -> Any:
    axes: Any = ctx.module_context.axis_context
    mesh = getattr(axes, "mesh", None)
    if mesh is not None and set(mesh.axis_names) == set(axes.manual_axes):
        return [x]
    devices = axes.num_devices if mesh is None else mesh.size
    if ctx.module_context.lowering_parameters.for_export and devices > 1:
        raise NotImplementedError(_NO_EXPORT)
    if isinstance(mesh, AbstractMesh):
        raise NotImplementedError(_NO_DEVICES)
    return [x]


# Cannot be lowered: the branch of every platform but CUDA when the kernels are a must.
_never_lowered = _identity("never_lowered")
mlir.register_lowering(_never_lowered, _refuse_lowering)
never_lowered = _never_lowered.bind


# Cannot be lowered where a custom_partitioning cannot: stands in front of one.
_partitionable = _identity("partitionable")
mlir.register_lowering(_partitionable, _check_partitioning)
partitionable = _partitionable.bind

# Cannot be differentiated: stands where the first derivative is written out, so it meets the second.
_constant = _identity("not_differentiable")
ad.primitive_jvps[_constant] = _refuse_derivative
not_differentiable = _constant.bind

# Cannot be differentiated either: e4m3 arrays and their scales, and what is to be quantized.
_quantized = _identity("quantized")
ad.primitive_jvps[_quantized] = _refuse_derivative_of_quantized
quantized = _quantized.bind

# Nor can what is computed from a KV cache.
_cached = _identity("cached")
ad.primitive_jvps[_cached] = _refuse_derivative_of_cache
cached = _cached.bind

# Can be differentiated in reverse mode only: its tangent can be transposed but not evaluated.
_primal, _tangent = _identity("reverse_mode_only"), _identity("reverse_mode_only_tangent")
_tangent.def_impl(_refuse_derivative)
mlir.register_lowering(_tangent, _refuse_derivative)
batching.primitive_batchers[_tangent] = _refuse_derivative
ad.primitive_jvps[_tangent] = _refuse_derivative
ad.primitive_transposes[_tangent] = lambda cotangent, _: [cotangent]
reverse_mode_only = _primal.bind


def _primal_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    return _primal.bind(x), t if type(t) is ad.Zero else _tangent.bind(t)


ad.primitive_jvps[_primal] = _primal_jvp
