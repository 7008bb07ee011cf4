"""JAX's modes: strict promotion, jax.disable_jit, jax_debug_infs and jax_debug_nans; that eager calls
compile once. Integers of wide dtypes, which jax_enable_x64 brings, are test_integers."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import BROKEN, CALLS, MASKS, T, around, tensors
from cases import TABLE, Case
from helpers import assert_close, with_gradients
from lowering import lower, targets
from masks import documents, ints, packed
from modes import EVERY, compiled_in_third_call, debug, results, strict

import jax_fa3

# One unit in the last place of bfloat16: op by op, Flax's layers round in other places. (In bfloat16
# implementation=None is the kernels' custom_jvp, with plain JAX inside; in fp32 it is plain JAX.)
ULP = 2**-7


@functools.cache
def usual(name: str) -> Any:
    with around(name):
        return results(name, None, *tensors())


@pytest.mark.parametrize("implementation", ["xla", "fa3"])
@pytest.mark.parametrize("case", {tuple(x.arguments): x for x in TABLE}.values(), ids=str)
def test_strict_promotion_of_arguments(case: Case, implementation: Any, on_cpu: None):
    """One case of those that have the same."""
    arguments: dict[str, Any] = case.arguments | {"implementation": implementation}
    attend = functools.partial(jax_fa3.dot_product_attention, return_residual=True, **arguments)

    def call(inputs: Any, cotangents: Any) -> Any:
        return with_gradients(attend, cotangents, *inputs)

    operands = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
    with strict():
        if implementation == "fa3":
            assert {"jax_fa3.fwd.v1", "jax_fa3.bwd.v1"} <= set(targets(lower(call, *shapes)))
        else:
            found = jax.eval_shape(call, *shapes)
            assert [x.shape for x in found[2:]] == [*case.shapes[:3]]
            assert found.out.dtype == found.dq.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", EVERY)
def test_strict_promotion(name: str, on_cpu: None):
    """Masks run, and what is done at compilation; the rest has the same shapes and dtypes."""
    with around(name), strict():
        if name in MASKS or name == "automatic axes":
            assert_close(results(name, None, *tensors()), usual(name), ULP)
        else:
            assert jax.tree.leaves(
                jax.eval_shape(functools.partial(results, name, None), *tensors())
            )


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("mode", [jax.disable_jit, debug])
def test_eager_modes(mode: Callable[[], Any], name: str, on_cpu: None):
    """An eager call and its gradients are what they are without the mode, and come soon."""
    wanted, start = usual(name), time.process_time()  # of this process, whatever else runs here
    with around(name), mode():
        found = results(name, None, *tensors())
    assert_close(found, wanted, ULP)
    assert time.process_time() - start < 60


ONE_DEVICE = sorted(CALLS.keys() - {"sharding", "automatic axes"})  # the others come at compilation


@pytest.mark.parametrize("name", ONE_DEVICE)
@pytest.mark.parametrize("mode", [strict, jax.disable_jit])
def test_modes_with_the_kernels(mode: Callable[[], Any], name: str, on_cpu: None):
    with around(name), mode():
        text = lower(functools.partial(results, name, "fa3"), *tensors())
    calls = targets(text)
    assert any(".fwd" in target for target in calls) and any(".bwd" in target for target in calls)


@pytest.mark.parametrize("mode", [strict, jax.disable_jit])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_broken_segments(implementation: Any, mode: Callable[[], Any], on_cpu: None):
    """NaN, and its gradient, but 0 where the cotangents are."""
    qkv = [x[:1] for x in tensors()]

    def call(*qkv: Any) -> Any:
        options: Any = {"return_residual": True, "implementation": implementation, **BROKEN}
        return jax_fa3.dot_product_attention(*qkv, padding_segment_id=2, **options)

    def every() -> Any:
        results, pullback = jax.vjp(call, *qkv)
        ones = jax.tree.map(jnp.ones_like, results)
        odd = jnp.arange(T) % 2 == 1
        some = tuple(jnp.where(odd.reshape(1, T, *[1] * (x.ndim - 2)), x, 0) for x in ones)
        return results, pullback(ones), pullback(some)

    wanted = every()
    with mode():
        found = every()
    assert_close(found, wanted, ULP)
    (out, _), (dq, _, _), (some, _, _) = (jax.tree.map(np.asarray, x) for x in found)
    broken = BROKEN["query_segment_ids"][0] == 0
    np.testing.assert_array_equal(np.isnan(out).all((0, 2, 3)), broken)
    np.testing.assert_array_equal(np.isnan(dq).all((0, 2, 3)), broken)
    np.testing.assert_array_equal(np.isnan(some).any((0, 2, 3)), broken & (np.arange(T) % 2 == 1))


def test_what_debug_modes_are_for():
    """They raise for a NaN or an infinity that was asked for: a broken segment's, and a log-sum-exp's
    of a row that sees nothing."""
    qkv = [x[:1] for x in tensors()]
    broken = packed(documents(5, 4, 7, ids=(0, 1, 0)))
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax_fa3.dot_product_attention(*qkv, **broken)
    lengths: Any = {"key_value_seq_lengths": ints(0), "return_residual": True}
    with jax.debug_infs(True), pytest.raises(FloatingPointError):
        jax_fa3.dot_product_attention(*qkv, **lengths)


# Whatever an eager shard_map runs, JAX compiles each time.
@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"ring in shard_map"}))
def test_eager_calls_compile_once(name: str, on_cpu: None):
    with around(name):
        for implementation in ("xla", None) if name in MASKS else ("xla",):
            call = functools.partial(EVERY[name], implementation, *tensors())
            assert compiled_in_third_call(call) == 0


def test_what_is_counted():
    """The count sees a program that is compiled anew each time."""
    x = jnp.ones(3)
    assert compiled_in_third_call(lambda: jax.jit(lambda x: 2 * x)(x)) == 1
