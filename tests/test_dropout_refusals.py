"""Dropout: what is an error, what the kernels refuse and what they take, and their calls."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dropouts import KEY
from lowering import lower, targets
from test_dropout import CASE, SOME, B, K, N, S, T
from test_ffi import needs_kernels

import jax_fa3
from jax_fa3 import _targets, context_parallel, fp8

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no key": ({"dropout_rate": 0.1}, "dropout_key: got None, wanted a key of jax.random"),
    "no rate": ({"dropout_key": KEY}, "dropout_key: got a key without dropout_rate, wanted None"),
    "one": ({**SOME, "dropout_rate": 1.0}, r"dropout_rate: got 1.0, wanted a static float in \[0"),
    "below": ({**SOME, "dropout_rate": -0.1}, "dropout_rate: got -0.1, wanted a static float"),
    "nan": ({**SOME, "dropout_rate": float("nan")}, "dropout_rate: got nan"),
    "text": ({**SOME, "dropout_rate": "0.1"}, "dropout_rate: got '0.1'"),
    "bool": ({**SOME, "dropout_rate": True}, "dropout_rate: got True"),
    "int key": ({**SOME, "dropout_key": 3}, "dropout_key: got 3, wanted one key of jax.random"),
    "keys": (
        {**SOME, "dropout_key": jax.random.split(KEY)},
        r"dropout_key: got keys of shape \(2,",
    ),
    "floats": ({**SOME, "dropout_key": jnp.ones(2)}, r"dropout_key: got float32\[2\], wanted one"),
    "words": (
        {**SOME, "dropout_key": jnp.ones(3, jnp.uint32)},
        r"dropout_key: got uint32\[3\], wanted one key",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case: str):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        jax_fa3.dot_product_attention(*CASE.inputs(jnp.float32), **options)


def test_a_raw_key_of_numpy():
    raw = jax.random.key_data(KEY)
    call = functools.partial(jax_fa3.dot_product_attention, *CASE.inputs(jnp.float32))
    options: Any = {**SOME, "dropout_key": np.asarray(raw)}
    np.testing.assert_array_equal(call(**options), call(**{**SOME, "dropout_key": raw}))


def test_traced_rate():
    qkv = CASE.inputs(jnp.float32)
    call = lambda rate: jax_fa3.dot_product_attention(*qkv, dropout_rate=rate, dropout_key=KEY)
    with pytest.raises(ValueError, match="^dropout_rate: got .*, wanted a static float"):
        jax.jit(call)(0.1)


def shapes(head_dim: int, key_length: int = S) -> Any:
    q = jax.ShapeDtypeStruct((B, T, N, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((B, key_length, K, head_dim), jnp.bfloat16)
    return q, k, k


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "80": (
        shapes(80),
        {},
        "dropout_rate: got one beside head dim 80, wanted up to 64, or 97 to 128",
    ),
    "256": (shapes(256), {}, "dropout_rate: got one beside head dim 256"),
    "keys": (shapes(64, 2**18 + 1), {}, "dropout_rate: got 262145 keys, wanted at most 262144"),
    "bias": (shapes(64), {"bias": jnp.zeros((T, S))}, "bias: got one beside dropout, wanted one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_refuse(case: str):
    qkv, options, message = REFUSED[case]
    reason = jax_fa3.is_supported(*qkv, device="sm_90", **SOME, **options)
    assert reason is not None and re.match(message, reason) and "implementation='xla'" in reason
    call = functools.partial(jax_fa3.dot_product_attention, implementation="fa3", **SOME, **options)
    with pytest.raises(NotImplementedError, match=f"^implementation='fa3': {message}"):
        jax.eval_shape(call, *qkv)


@needs_kernels
@pytest.mark.parametrize("head_dim", [8, 64, 104, 128])
def test_what_they_take(head_dim: int):
    key = jax.eval_shape(lambda: jax.random.key(0))
    options: Any = {"dropout_rate": 0.1, "dropout_key": key}
    assert jax_fa3.is_supported(*shapes(head_dim), device="sm_90", **options) is None


@needs_kernels
def test_lowering():
    """Forward and backward get the heads' words; without dropout nothing is there."""

    def loss(options: Any, *qkv: Any) -> Any:
        out = jax_fa3.dot_product_attention(*qkv, implementation="fa3", **options)
        return out.astype(jnp.float32).sum()

    text = lower(jax.grad(functools.partial(loss, SOME), (0, 1, 2)), *shapes(64))
    assert targets(text) == [_targets.FWD, _targets.BWD]
    assert text.count(f"dropout = {round(0.1 * 2**18)} : i64") == 2
    assert text.count(f"tensor<{B}x{N}x2xui32>") >= 2
    text = lower(jax.grad(functools.partial(loss, {}), (0, 1, 2)), *shapes(64))
    assert text.count("dropout = 0 : i64") == 2 and "2xui32>" not in text


@pytest.mark.parametrize("of", ["fp8", "ring"])
def test_others_have_none(of: str):
    qkv = CASE.inputs(jnp.bfloat16)
    function: Any = fp8.dot_product_attention
    if of == "ring":
        function = functools.partial(context_parallel.dot_product_attention, axis_name="x")
    with pytest.raises(NotImplementedError, match=r"^dropout_rate: got 0.1, wanted 0 or None: "):
        function(*qkv, **SOME)
