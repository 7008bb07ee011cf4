"""Gradients of attention in FP8: the 16-bit backward, under every transformation."""

import functools
from typing import Any

import fp8_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TABLE, Case
from helpers import assert_close
from lowering import lower, targets

import jax_fa3
from jax_fa3 import _xla, fp8
from jax_fa3._operands import Operands, Rows
from jax_fa3._problem import Config, Masks

QUANTIZE, FWD, BWD = "jax_fa3.quantize.v1", "jax_fa3.fwd_fp8.v1", "jax_fa3.bwd.v1"
CASES = {case.name: case for case in TABLE}
CASE = Case("fp8", 140, 260, 4, 2, 64, B=2, mask={"is_causal": True, "query_offset": 60})
QKV = CASE.inputs(jnp.float16)


pytestmark = pytest.mark.usefixtures("on_cpu")


def attention(*qkv: Any, **options: Any) -> Any:
    return fp8.dot_product_attention(*qkv, **{"return_residual": True} | options)


def weighted(call: Any, weights: Any = 1.0) -> Any:
    def loss(*qkv):
        out, lse = call(*qkv)
        return (out * weights).astype(jnp.float32).sum() + jnp.sin(lse).sum()

    return loss


SHIFTED = QKV[0], QKV[1].at[..., 3].add(20), 1 + QKV[2] * jnp.float16(0.3)


def seen_by_the_forward(qkv: Any) -> tuple[list[Any], Any]:
    """query, key without its mean, and value as they were rounded, in fp16; and that mean."""
    signs, found = fp8.random_signs(0, CASE.H), []
    means = None, *map(fp8.token_mean, qkv[1:])
    for x, mean, flips in zip(qkv, means, (signs, signs, None), strict=True):
        x8, scales = fp8.quantize(x, signs=flips, mean=mean, implementation="xla")
        y = jnp.asarray(fp8_oracle.dequantized(x8, scales))
        if flips is not None:
            y = fp8.hadamard_transform(y) * flips
        found.append(y)
    assert means[2] is not None
    found[2] += means[2][:, None]
    return [x.astype(jnp.float16) for x in found], means[1]


@pytest.mark.parametrize("qkv", [QKV, SHIFTED], ids=["mean 0", "shifted"])
def test_gradients_are_of_the_rounded_arrays(qkv):
    """The 16-bit backward with the FP8 forward's out and log-sum-exp, of what that saw."""
    cotangents = CASE.cotangents(jnp.float16)
    (out, lse), pullback = jax.vjp(functools.partial(attention, **CASE.mask), *qkv)
    found = pullback(cotangents)
    config = Config(64**-0.5, (None, 60), None, False, partial=True)
    dout, dlse = cotangents[0], cotangents[1].swapaxes(1, 2)
    seen, key_mean = seen_by_the_forward(qkv)
    mean = jnp.repeat(key_mean, CASE.N // CASE.K, axis=1)
    shift = jnp.einsum("btnh,bnh->bnt", qkv[0].astype(jnp.float32), mean) * config.scale
    rows = Rows(out, lse.swapaxes(1, 2) - shift, dout, dlse)
    dq, *dkv = _xla.backward(config, Operands(*seen), Masks(), rows)
    dq = dq + config.scale * cotangents[1][..., None] * mean[:, None]
    assert_close(found, [x.astype(jnp.float16) for x in (dq, *dkv)], 2e-3)
    plain = functools.partial(jax_fa3.dot_product_attention, return_residual=True, **CASE.mask)
    for x, y in zip(found, jax.vjp(plain, *qkv)[1](cotangents), strict=True):
        assert x.dtype == jnp.float16
        error, size = (np.linalg.norm(np.asarray(a, np.float64)) for a in (x - y, y))
        assert error < 0.06 * size


@pytest.mark.parametrize("qkv", [QKV, SHIFTED], ids=["mean 0", "shifted"])
def test_gradients_of_large_scores(qkv):
    """Where a rounded score is off by much, weights still add up to 1 and gradients of a row's scores to 0:
    else those of key have a part in common, which grows from step to step of a training."""
    query, (dout, _) = 6 * qkv[0], CASE.cotangents(jnp.float16)

    def gradients(call: Any) -> list[np.ndarray]:
        function = functools.partial(call, **CASE.mask)
        found = jax.vjp(function, query, *qkv[1:])[1](dout)
        return [np.asarray(x, np.float64) for x in found]

    found = gradients(fp8.dot_product_attention)
    wanted = gradients(jax_fa3.dot_product_attention)
    for x, y in zip(found, wanted, strict=True):
        assert np.linalg.norm(x - y) < 0.2 * np.linalg.norm(y)
    assert np.linalg.norm(found[1].sum(1)) < 0.05 * np.linalg.norm(found[1])


Q, K, V = QKV
QQ = jnp.stack([Q, -2 * Q])


@pytest.mark.parametrize(
    ("transform", "operands"),
    [
        (lambda f: jax.jit(jax.grad(weighted(f), (0, 2))), QKV),
        (lambda f: jax.grad(jax.checkpoint(weighted(f)), (0, 1)), QKV),
        (lambda f: jax.vmap(jax.grad(weighted(f), (0, 1)), (0, None, None)), (QQ, K, V)),
        (
            lambda f: jax.grad(lambda *x: jax.vmap(weighted(f), (0, None, None))(*x).sum(), 1),
            (QQ, K, V),
        ),
    ],
    ids=["jit", "remat", "vmap of grad", "grad of vmap"],
)
def test_transformations(transform, operands):
    """As if each were written out."""
    call = functools.partial(attention, **CASE.mask)
    found = transform(call)(*operands)

    def loops(q, k, v):
        return sum(weighted(call)(x, k, v) for x in q) if q.ndim == 5 else weighted(call)(q, k, v)

    all_three = jax.grad(loops, (0, 1, 2))(*operands)
    if isinstance(found, jax.Array):
        assert_close(found, all_three[1], 0.02)
    else:
        assert_close(found[0], all_three[0], 0.02)


@pytest.mark.parametrize("implementation", [None, "xla", "fa3"])
def test_other_derivatives_are_refused(implementation):
    loss = weighted(functools.partial(attention, implementation=implementation))
    for derivative in (jax.hessian(loss), lambda *x: jax.jvp(loss, x, x)):
        with pytest.raises(NotImplementedError, match="jax_fa3.fp8 .* first derivatives in rev"):
            lower(derivative, *QKV)


@pytest.mark.parametrize("quantization", ["block", "tensor"])
def test_padding_never_shows(quantization):
    case = CASES["planted, causal"]
    call = functools.partial(attention, **case.arguments, quantization=quantization)
    clean = [jnp.nan_to_num(x, nan=0, posinf=0) for x in case.inputs(jnp.float16)]
    cotangents = case.cotangents(jnp.float16)

    @jax.jit
    def everything(*qkv):
        results, pullback = jax.vjp(call, *qkv)
        return results, pullback(cotangents)

    found = everything(*case.inputs(jnp.float16))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(everything(*clean)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not any(np.isnan(np.asarray(x)).any() for x in jax.tree.leaves(found))


def test_lowers_to_one_forward_and_one_backward():
    shapes = (2, 140, 4, 128), (2, 260, 2, 128), (2, 260, 2, 128)
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    gradients = jax.grad(weighted(attention), (0, 1, 2))
    assert targets(lower(gradients, *operands)) == [QUANTIZE] * 3 + [FWD] + [QUANTIZE] * 3 + [BWD]
    policy = jax.checkpoint_policies.save_only_these_names(*jax_fa3.RESIDUAL_NAMES)
    context = jax.checkpoint_policies.save_only_these_names("context")
    named = functools.partial(attention, checkpoint_name="context")
    for function, options, forwards in (
        (attention, {}, 2),
        (attention, {"policy": policy}, 1),
        (named, {"policy": context}, 1),
    ):
        loss = weighted(jax.checkpoint(function, **options))
        found = targets(lower(jax.grad(loss, (0, 1, 2)), *operands))
        assert found.count(FWD) == forwards and found.count(BWD) == 1
