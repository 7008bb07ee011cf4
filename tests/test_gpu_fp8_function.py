"""The function that quantizes for FP8 attention, on a Hopper GPU."""

import dataclasses
import functools
from typing import Any

import fp8_oracle
import jax
import jax.numpy as jnp
import pytest
from cases import TABLE, Case
from helpers import assert_rounded, equal, oracle, with_gradients
from long_cases import LONG

import jax_fa3
from jax_fa3 import fp8

pytestmark = pytest.mark.gpu

attention = functools.partial(fp8.dot_product_attention, implementation="fa3", return_residual=True)
MANY = Case("many", 2048, 2048, 8, 2, 128, B=1, mask={"is_causal": True})

FUNCTION = ["planted, causal", "planted, window", "documents, padding", "soft cap, documents"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", [*FUNCTION, "long, causal"])
@pytest.mark.parametrize("options", [{}, {"incoherent_key": None, "quantization": "head"}], ids=str)
@pytest.mark.parametrize("shifted", [False, True], ids=["mean 0", "shifted"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_function(name: str, dtype: Any, options: Any, shifted: bool, head_dim: int):
    """Results and gradients, against 16-bit attention: errors are at most twice those of the oracle's
    out and log-sum-exp, and of the gradients that go by these and by the rounded arrays."""
    case = {case.name: case for case in [*TABLE, *LONG]}[name]
    case = dataclasses.replace(case, H=head_dim, V=0)
    inputs, cotangents = case.inputs(dtype), case.cotangents(dtype)
    if shifted:  # values around 1, and a constant channel of keys
        q, k, v = inputs
        inputs = q, k.at[..., 3].add(20), 1 + v * jnp.asarray(0.3, dtype)

    call = functools.partial(attention, **case.arguments, **options)
    found = jax.jit(functools.partial(with_gradients, call))(cotangents, *inputs)
    exact = oracle(case, dtype, inputs, cotangents)
    signs = None if "incoherent_key" in options else fp8.random_signs(0, case.H)
    lengths = [case.mask.get(f"{x}_seq_lengths") for x in ("query", "key_value", "key_value")]
    taken = [False, case.logits_soft_cap is None, True]
    means = [
        fp8.token_mean(x, lengths=n) if out else None
        for x, n, out in zip(inputs, lengths, taken, strict=True)
    ]
    quantize = functools.partial(
        fp8.quantize, quantization=options.get("quantization", "block"), implementation="xla"
    )
    pairs = [
        quantize(x, lengths=n, signs=s, mean=m)
        for x, n, s, m in zip(inputs, lengths, (signs, signs, None), means, strict=True)
    ]
    dequantized = fp8_oracle.all_dequantized(*zip(*pairs, strict=True))
    rounded = fp8_oracle.oracle(case, dequantized, jnp.float32, stepwise=True)
    with_means = functools.partial(fp8_oracle.with_means, case, rounded, inputs[0])
    seen = [
        x if s is None else fp8.hadamard_transform(x) * s
        for x, s in zip(dequantized, (signs, signs, None), strict=True)
    ]
    assert means[2] is not None
    seen[2] += means[2][:, None]
    seen = [x.astype(dtype) for x in seen]
    of_seen = with_means(None, means[2], jnp.float32)
    rounded = with_means(means[1], means[2], dtype)
    rounded = fp8_oracle.with_backward(case, rounded, of_seen, seen, cotangents, means[1])
    assert found.out.dtype == found.dq.dtype == dtype
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gradients_of_large_scores(head_dim: int):
    """Weights add up to 1 in the backward and gradients of a row's scores to 0, whatever rounding made of
    scores of 30: else training diverges."""
    case = dataclasses.replace(MANY, H=head_dim)
    (q, k, v), (dout, _) = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    q, k, v = 6 * q, k.at[..., 3].add(5), 1 + v

    def gradients(call: Any) -> list[Any]:
        found = jax.vjp(functools.partial(call, is_causal=True, implementation="fa3"), q, k, v)
        return [x.astype(jnp.float32) for x in found[1](dout)]

    found, wanted = map(gradients, (fp8.dot_product_attention, jax_fa3.dot_product_attention))
    for x, y in zip(found, wanted, strict=True):
        assert jnp.linalg.norm(x - y) < 0.2 * jnp.linalg.norm(y)
    assert jnp.linalg.norm(found[1].sum(1)) < 0.05 * jnp.linalg.norm(found[1])


def test_vmap_is_batch():
    q, k, v = MANY.inputs(jnp.bfloat16)
    queries, lengths = jnp.stack([q, -q, q[:, ::-1]]), jnp.array([[700], [0], [2048]])
    call = jax.jit(lambda q, n: attention(q, k, v, key_value_seq_lengths=n, is_causal=True))
    found = jax.jit(jax.vmap(call))(queries, lengths)
    for i in range(3):
        assert equal([x[i] for x in found], call(queries[i], lengths[i]))


def test_none_takes_the_kernels():
    q, k, v = MANY.inputs(jnp.bfloat16)
    assert equal(fp8.dot_product_attention(q, k, v), attention(q, k, v)[0])
    exact = jax_fa3.dot_product_attention(q, k, v, implementation="fa3")
    error = fp8.dot_product_attention(q, k, v).astype(jnp.float32) - exact
    assert 0 < jnp.linalg.norm(error) < 0.1 * jnp.linalg.norm(exact.astype(jnp.float32))
