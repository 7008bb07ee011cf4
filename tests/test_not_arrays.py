"""What is no array of numbers, in the place of one: an error of ours that names the argument."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from lowering import hide_gpus

import jax_fa3
import jax_fa3.flax
from jax_fa3 import context_parallel, fp8

B, T, N, K, H = 2, 16, 4, 2, 64
Q, KV = jnp.zeros((B, T, N, H), jnp.bfloat16), jnp.zeros((B, T, K, H), jnp.bfloat16)
E4M3 = {"query": Q, "key": KV, "value": KV}
E4M3 = {name: x.astype(jnp.float8_e4m3fn) for name, x in E4M3.items()}
SCALES = {f"{name}_scale": 1.0 for name in E4M3}
IDS = np.zeros((B, T), int)
X = jnp.zeros((B, T, 24))

BAD = {
    "none": None,
    "string": "abc",
    "dict": {"a": 1},
    "list of strings": ["a", "b"],
    "array of strings": np.array(["a", "b"]),
    "list of None": [None, None],
    "unequal rows": [[1, 2], [3]],
    "object": object(),
}
OPTIONAL = {
    "query_seq_lengths": {},
    "key_value_seq_lengths": {},
    "query_offset": {},
    "query_segment_ids": {"key_value_segment_ids": IDS},
    "key_value_segment_ids": {"query_segment_ids": IDS},
    "key_begin": {},
    "key_end": {},
}
DENSE = {"bias": {}, "mask": {}}
TENSORS = {"query": Q, "key": KV, "value": KV}


def layer(api: str, **arguments: Any) -> Any:
    sizes: Any = {"num_heads": N, "qkv_features": N * H, "rotary_base": 10.0}
    if api == "nnx":
        made = jax_fa3.flax.nnx.MultiHeadAttention(in_features=24, rngs=nnx.Rngs(0), **sizes)
        return functools.partial(made)(**arguments)
    return jax_fa3.flax.linen.MultiHeadAttention(**sizes).init_with_output(
        nnx.Rngs(0).params(), **arguments
    )


def attention_fn(**arguments: Any) -> Any:
    return jax_fa3.flax.make_attention_fn()(**arguments)


# Functions, their good arguments, and those of their arguments that have to be arrays, each with what
# goes with it; and those that may also be None.
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any], Any, Any]] = {
    "attention": (jax_fa3.dot_product_attention, TENSORS, TENSORS, OPTIONAL | DENSE),
    "packed": (
        jax_fa3.qkv_dot_product_attention,
        {"qkv": jnp.zeros((B, T, 3, N, H))},
        ["qkv"],
        OPTIONAL | DENSE,
    ),
    "intervals": (
        jax_fa3.key_intervals,
        {"query_length": T, "key_length": T, "batch": B},
        [],
        OPTIONAL,
    ),
    "fp8": (fp8.dot_product_attention, TENSORS, TENSORS, OPTIONAL),
    "quantized": (
        fp8.quantized_dot_product_attention,
        E4M3 | SCALES,
        E4M3 | SCALES,
        OPTIONAL,
    ),
    "quantize": (fp8.quantize, {"x": Q}, ["x"], {"lengths": {}, "signs": {}}),
    "hadamard": (fp8.hadamard_transform, {"x": Q}, ["x"], {"signs": {}}),
    "signs": (functools.partial(fp8.random_signs, head_dim=H), {"key": 0}, ["key"], {}),
    "context": (
        functools.partial(context_parallel.dot_product_attention, axis_name="x"),
        TENSORS,
        TENSORS,
        OPTIONAL,
    ),
    "merge": (context_parallel.merge, {"outs": [Q], "lses": [Q[..., 0]]}, ["outs", "lses"], {}),
    "zigzag": (functools.partial(context_parallel.to_zigzag, axis_size=2), {"x": Q}, ["x"], {}),
    "natural": (functools.partial(context_parallel.from_zigzag, axis_size=2), {"x": Q}, ["x"], {}),
    "own heads": (functools.partial(jax_fa3.own_kv_heads, axis_name="x"), {"x": Q}, ["x"], {}),
    "flax mask": (
        jax_fa3.flax.mask_to_intervals,
        {"mask": nn.make_causal_mask(X[..., 0])},
        ["mask"],
        {},
    ),
    "attention_fn": (attention_fn, TENSORS, TENSORS, {"mask": {}}),
}
for _api in ("nnx", "linen"):
    _optional = {"inputs_k": {}, "inputs_v": {"inputs_k": X}, "positions": {}, **OPTIONAL}
    FUNCTIONS[_api] = functools.partial(layer, _api), {"inputs_q": X}, ["inputs_q"], _optional


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch):
    hide_gpus(monkeypatch)


# Which are arrays there: merge takes a list of them, the order of a sequence does not ask of what.
FINE = {("merge", "unequal rows"), ("zigzag", "array of strings"), ("natural", "array of strings")}


@pytest.mark.parametrize(
    ("function", "bad"), [(f, bad) for f in FUNCTIONS for bad in BAD if (f, bad) not in FINE]
)
def test_arguments_are_named(function: str, bad: str):
    call, good, needed, optional = FUNCTIONS[function]
    cases = [(name, {}) for name in needed]
    cases += [] if bad == "none" else optional.items()
    for name, others in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(name)}: got .*, wanted ") as error:
            call(**good | others | {name: BAD[bad]})
        assert "\n" not in str(error.value), name


def test_messages():
    with pytest.raises(ValueError, match="key: got None, wanted an array of numbers"):
        jax_fa3.dot_product_attention(Q, None, KV)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="value: got a list of str, wanted an array of numbers"):
        jax_fa3.dot_product_attention(Q, KV, ["a"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="key: got a ShapedArray, wanted an array of numbers"):
        jax_fa3.dot_product_attention(Q, jnp.zeros(2).aval, KV)  # pyright: ignore


def test_what_is_an_array_still_is():
    """Lists, and what says by __jax_array__ that it is one."""
    one: Any = np.ones((T, K, H), np.float32).tolist()
    wanted = jax_fa3.dot_product_attention(*[np.ones((T, K, H), np.float32)] * 3)
    np.testing.assert_array_equal(jax_fa3.dot_product_attention(one, one, one), wanted)
    variable: Any = nnx.Param(jnp.ones((T, K, H)))
    found = jax_fa3.dot_product_attention(variable, variable, variable)
    np.testing.assert_array_equal(found, wanted)
