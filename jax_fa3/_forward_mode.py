"""Both modes of differentiation through one custom_jvp: the tangent of a call is a linear function of
the operands' tangents, a primitive of our own. Evaluated it is the tangent kernel, transposed the
backward kernel; jax.grad transposes it and never evaluates it.

A custom_vjp has no forward mode. JAX's linear_call has both, but no vmap; and it has no derivative by
the operands, on which the linear function depends: that one, of second order, is XLA's here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.core import eval_jaxpr
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir

from . import _bias
from ._guards import Primitive, not_differentiable
from ._jitted import finite_in_debug_mode
from ._operands import Operands, Rows
from ._problem import Masks
from ._varying import vary_together

Results = tuple[Array, ...]
# What the forward leaves for the backward besides its arguments. With the jax.checkpoint policy
# save_only_these_names(*RESIDUAL_NAMES) the forward kernel runs once, not twice.
RESIDUAL_NAMES = ("jax_fa3_out", "jax_fa3_lse", "jax_fa3_lse_low")


def differentiable(method: Any, operands: Operands, masks: Masks) -> Results:
    """out [B, T, N, V] and lse [B, N, T], with first derivatives in both modes.

    Args:
        method: _autodiff.Method, with tangents, that needs no more than operands and masks.
    """
    operands, masks = vary_together((operands, masks))
    return _primal(method, operands, masks)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _primal(method: Any, operands: Operands, masks: Masks) -> Results:
    return method.forward(operands, masks, None, for_gradient=False)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_rest(method: Any, operands: Operands, masks: Masks) -> Results:
    """The same, and what the backward needs besides."""
    return method.forward(operands, masks, None, for_gradient=True)


def _rule(method: Any, primals: Any, tangents: Any) -> tuple[Results, tuple[Any, ...]]:
    # Differentiable again: a derivative of the results that were computed in forward mode.
    results = tuple(map(checkpoint_name, _with_rest(method, *primals), RESIDUAL_NAMES))
    out, lse, *rest = named(method.config, results)
    leaves, tree = jax.tree.flatten(primals[0])
    given = tree.flatten_up_to(tangents[0])
    moving = tuple(not isinstance(x, SymbolicZero) for x in given)
    residuals, structure = jax.tree.flatten((*primals, out, finite_in_debug_mode(lse), *rest))
    assert len(leaves) == len(moving)
    tangent = _Tangent(method, structure, moving)
    found = tangent.bind(*residuals, *(x for x, moves in zip(given, moving, strict=True) if moves))
    return (out, lse, *rest), (*found, *(SymbolicZero(jax.typeof(x)) for x in rest))


def _primal_rule(method: Any, primals: Any, tangents: Any) -> tuple[Results, tuple[Any, ...]]:
    results, along = _rule(method, primals, tangents)
    return results[:2], along[:2]


_primal.defjvp(_primal_rule, symbolic_zeros=True)
_with_rest.defjvp(_rule, symbolic_zeros=True)


def named(config: Any, results: Results) -> Results:
    """The forward's results with the user's names. A policy sees every name of an array that has
    several: it saves the first that it knows, and the others cost nothing."""
    if config.checkpoint_names is None:
        return results
    of_out, of_lse = config.checkpoint_names
    return tuple(map(checkpoint_name, results, (of_out, of_lse, of_lse)))


@dataclasses.dataclass(frozen=True)
class _Tangent:
    """The functions of one call of the primitive, of flat arrays: first the residuals, which are the
    leaves of (operands, masks, out, lse, rest), and then what the function is linear in."""

    method: Any
    structure: Any  # of the residuals
    moving: tuple[bool, ...]  # which leaves of the operands have tangents
    # Of each vmap around, the innermost first: axes of the residuals, and the name that spmd_axis_name
    # gave. Whatever is linear has its axis in front.
    vmaps: tuple[tuple[tuple[int | None, ...], Any], ...] = ()

    @property
    def num_residuals(self) -> int:
        return self.structure.num_leaves

    def bind(self, *arrays: Array) -> list[Array]:
        # Traced here, where the mesh is known, and not when it is lowered.
        with jax.disable_jit(False):
            jaxpr = jax.make_jaxpr(_traced, static_argnums=0)(self, *arrays)
        return _tangent.bind(*arrays, function=self, jaxpr=jaxpr)

    def tangent(self, *arrays: Array) -> Results:
        """Of the operands' moving leaves to the tangents of out and lse."""
        return self._mapped(self._tangent_of_one)(*arrays)

    def transposed(self, *arrays: Array | None) -> Results:
        """Of the cotangents of out and lse to those of the operands' moving leaves."""
        return self._mapped(self._transposed_of_one)(*arrays)

    def derivative(self, along: tuple[bool, ...], *arrays: Array) -> Results:
        """Of `tangent` as a function of the operands: behind its arguments stand tangents of some of
        their leaves."""
        function = functools.partial(self._derivative_of_one, along)
        return self._mapped(function, along)(*arrays)

    def _mapped(self, function: Any, along: tuple[bool, ...] = ()) -> Any:
        for axes, spmd_axis_name in self.vmaps:
            behind = tuple(axis for axis, moves in zip(axes, along, strict=False) if moves)

            def mapped(
                *arrays: Array, function: Any = function, axes: Any = axes, behind: Any = behind,
                name: Any = spmd_axis_name,
            ) -> Results:  # fmt: skip
                linear = (0,) * (len(arrays) - len(axes) - len(behind))
                in_axes = (*axes, *linear, *behind)
                return jax.vmap(function, in_axes, spmd_axis_name=name)(*arrays)

            function = mapped
        return function

    def _split(self, arrays: Results) -> tuple[Any, Results]:
        count = self.num_residuals
        return jax.tree.unflatten(self.structure, arrays[:count]), arrays[count:]

    def _tangent_of_one(self, *arrays: Array) -> Results:
        (operands, masks, out, lse, *low), linear = self._split(arrays)
        # The rows' cotangents are none: nobody asks for them.
        rows = Rows(out, lse, None, None, *low)  # pyright: ignore[reportArgumentType]
        tangents = self._with_leaves(operands, linear)
        return self.method.tangent(operands, masks, rows, tangents)

    def _transposed_of_one(self, *arrays: Array) -> Results:
        (operands, masks, out, lse, *low), cotangents = self._split(arrays)
        operands = jax.tree.map(not_differentiable, operands)
        moves = jax.tree.unflatten(jax.tree.structure(operands), self.moving)
        rows = Rows(out, lse, *cotangents, *low)
        with_dbias = any(getattr(moves, name) for name in _bias.TERMS)
        grads = self.method.backward(operands, masks, rows, with_dbias=with_dbias)
        found = jax.tree.structure(operands).flatten_up_to(grads)
        return tuple(x for x, moves in zip(found, self.moving, strict=True) if moves)

    def _derivative_of_one(self, along: tuple[bool, ...], *arrays: Array) -> Results:
        (operands, masks, *_), rest = self._split(arrays)
        linear, tangents = rest[: sum(self.moving)], rest[sum(self.moving) :]
        leaves, tree = jax.tree.flatten(operands)
        varied = [x for x, moves in zip(leaves, along, strict=True) if moves]

        @jax.checkpoint  # so that nothing is kept for a derivative that is often not asked for
        def function(*varied: Array) -> Results:
            rest = iter(varied)
            chosen = (next(rest) if m else x for x, m in zip(leaves, along, strict=True))
            operands = jax.tree.unflatten(tree, chosen)
            tangents = self._with_leaves(operands, linear)
            return self.method.plain_tangent(operands, masks, tangents)

        varied, tangents = vary_together((tuple(varied), tuple(tangents)))
        return jax.jvp(function, varied, tangents)[1]

    def _with_leaves(self, operands: Operands, linear: Results) -> Operands:
        """Tangents like operands, None where nothing moves."""
        given, tree = iter(linear), jax.tree.structure(operands)
        return jax.tree.unflatten(tree, [next(given) if moves else None for moves in self.moving])


# Once for calls that are alike, as the layers of a model are.
_traced = jax.jit(lambda function, *arrays: function.tangent(*arrays), static_argnums=0)

_tangent = Primitive("jax_fa3_tangent")
_tangent.multiple_results = True


def _evaluate(*arrays: Array, function: _Tangent, jaxpr: Any) -> list[Array]:
    return eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *arrays)


def _jvp(primals: Any, tangents: Any, *, function: _Tangent, jaxpr: Any) -> tuple[Any, Any]:
    found = _tangent.bind(*primals, function=function, jaxpr=jaxpr)
    count, terms = function.num_residuals, []
    of_operands, linear = tangents[: len(function.moving)], tangents[count:]
    if any(type(x) is not ad.Zero for x in linear):
        moved = map(ad.instantiate_zeros, linear)
        terms.append(_tangent.bind(*primals[:count], *moved, function=function, jaxpr=jaxpr))
    # out, lse and what they lost are functions of the operands, not arguments of their own.
    along = tuple(type(x) is not ad.Zero for x in of_operands)
    if any(along):
        moved = (x for x, moves in zip(of_operands, along, strict=True) if moves)
        terms.append(function.derivative(along, *primals, *moved))
    if not terms:
        return found, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in found]
    return found, [sum(x[1:], x[0]) for x in zip(*terms, strict=True)]


def _transpose(cotangents: Any, *arrays: Any, function: _Tangent, jaxpr: Any) -> list[Any]:
    count = function.num_residuals
    of_out, of_lse = cotangents
    # That of lse is 0 in most models, and then not even written.
    of_lse = None if type(of_lse) is ad.Zero else of_lse
    grads = function.transposed(*arrays[:count], ad.instantiate_zeros(of_out), of_lse)
    wanted = map(ad.is_undefined_primal, arrays[count:])
    return [None] * count + [x if w else None for x, w in zip(grads, wanted, strict=True)]


def _batch(
    axis: Any, arrays: Any, dims: Any, *, function: _Tangent, jaxpr: Any
) -> tuple[list[Array], list[int]]:
    count = function.num_residuals
    # All that is linear gets the axis, so that what is transposed to it has it, too.
    linear = (
        batching.bdim_at_front(x, dim, axis.size, axis.explicit_mesh_axis)
        for x, dim in zip(arrays[count:], dims[count:], strict=True)
    )
    mapped = (tuple(dims[:count]), axis.spmd_name)
    function = dataclasses.replace(function, vmaps=(*function.vmaps, mapped))
    found = function.bind(*arrays[:count], *linear)
    return found, [0] * len(found)


_tangent.def_impl(_evaluate)
_tangent.def_abstract_eval(lambda *_, function, jaxpr: jaxpr.out_avals)
mlir.register_lowering(_tangent, mlir.lower_fun(_evaluate, multiple_results=True))
ad.primitive_jvps[_tangent] = _jvp
ad.primitive_transposes[_tangent] = _transpose
batching.fancy_primitive_batchers[_tangent] = _batch
