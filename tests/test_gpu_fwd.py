"""The kernels on a Hopper GPU: results and gradients of the whole table, and the forward by itself."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, TABLE, Case
from helpers import (
    assert_rounded,
    both_oracles,
    equal,
    poison,
    temporary_bytes,
    with_gradients,
)
from jax import Array
from long_cases import LONG
from masks import ints

import jax_fa3

pytestmark = pytest.mark.gpu

ALL = [*TABLE, *LONG]
CASES = {case.name: case for case in ALL}
attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)
packed_attention = functools.partial(
    jax_fa3.qkv_dot_product_attention, implementation="fa3", return_residual=True
)
DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])


oracles = jax.jit(both_oracles, static_argnums=(0, 1))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, jnp.bfloat16) for case in ALL] + [(case, jnp.float16) for case in ALL[::2]],
    ids=str,
)
def test_table(case: Case, dtype: Any):
    inputs, cotangents = case.inputs(dtype), case.cotangents(dtype)
    poison(case, dtype)
    call = functools.partial(attention, **case.arguments)
    found = jax.jit(functools.partial(with_gradients, call))(cotangents, *inputs)
    assert found.out.dtype == found.dq.dtype == dtype and found.lse.dtype == jnp.float32
    exact, rounded = oracles(case, dtype, inputs, cotangents)
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)


@pytest.mark.parametrize(
    "name", ["long, causal", "long, documents", "long, full", "planted, causal", "any intervals"]
)
def test_bit_equal_200_times(name: str):
    """Whatever stood in the results' memory before."""
    case = CASES[name]
    inputs = case.inputs(jnp.bfloat16)
    call = jax.jit(functools.partial(attention, **case.arguments))
    first = call(*inputs)

    @jax.jit
    def same(x: Any, y: Any) -> Array:
        pairs = zip(x, y, strict=True)
        return jnp.array([jnp.array_equal(a, b, equal_nan=True) for a, b in pairs]).all()

    for _ in range(5):
        poison(case, jnp.bfloat16)
        repeats = [same(first, call(*inputs)) for _ in range(40)]
        assert all(repeats)
    assert equal(first, call(*inputs))


NO_WORK = {"parameter", "custom-call", "get-tuple-element", "tuple", "constant", "bitcast"}


def operations(function: Any, *args: Any) -> set[str]:
    """The names of the compiled program's operations; of fusions, what they are made of."""
    text = jax.jit(function).lower(*args).compile().as_text()
    assert text is not None and text.count('custom_call_target="jax_fa3.fwd.v1"') == 1
    found = re.findall(r"^\s+(?:ROOT )?\S+ = .*?[\]})] ([a-z][\w-]*)\(", text, re.MULTILINE)
    return set(found) - {"fusion"}


@DTYPES
@pytest.mark.parametrize("name", ["long, causal", "documents, causal", "K = N"])
def test_packed(name: str, dtype: Any):
    """One array in, in both forms, gives what three arrays give."""
    case = CASES[name]
    q, k, v = (x[:, : min(case.T, case.S)] for x in case.inputs(dtype))
    mask = case.mask or CAUSAL

    def one(qkv: Array) -> Any:
        return packed_attention(qkv, case.K, **mask)

    qkv = jnp.concatenate([q, k, v], axis=2)
    separate = jax.jit(functools.partial(attention, **mask))(q, k, v)
    assert equal(jax.jit(one)(qkv), separate)
    assert operations(lambda x: one(x)[0], qkv) <= NO_WORK
    if case.N == case.K:
        stacked = jnp.stack([q, k, v], axis=2)
        assert equal(jax.jit(functools.partial(packed_attention, **mask))(stacked), separate)

    def loss(results: Any) -> Array:
        out, lse = results
        return (out.astype(jnp.float32) ** 2).sum() + lse.sum()

    gradient = jax.jit(jax.grad(lambda x: loss(one(x))))(qkv)
    each = jax.jit(jax.grad(lambda *x: loss(attention(*x, **mask)), (0, 1, 2)))(q, k, v)
    assert gradient.dtype == dtype
    both = (np.asarray(x, np.float32) for x in (gradient, jnp.concatenate(each, axis=2)))
    np.testing.assert_allclose(*both, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["long, causal", "any intervals", "both lengths, window"])
def test_is_one_kernel(name: str):
    """No copies, transposes or anything else around the custom call."""
    case = CASES[name]
    arrays = {k: x for k, x in case.mask.items() if isinstance(x, np.ndarray)}
    static = {k: x for k, x in case.mask.items() if k not in arrays}

    def call(inputs: Any, arrays: Any) -> Array:
        return jax_fa3.dot_product_attention(*inputs, **arrays, **static, implementation="fa3")

    assert operations(call, case.inputs(jnp.bfloat16), arrays) <= NO_WORK


def test_memory_is_linear():
    def temporaries(length: int) -> tuple[int, int]:
        case = Case("memory", length, length, 8, 2, 128, B=1)
        inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in case.shapes[:3]]
        call = functools.partial(attention, **CAUSAL)
        gradients = jax.grad(lambda *x: call(*x)[0].sum(dtype=jnp.float32), (0, 1, 2))
        return temporary_bytes(call, *inputs), temporary_bytes(gradients, *inputs)

    for once, twice in zip(temporaries(2**16), temporaries(2**17), strict=True):
        assert twice < 2.1 * once + 2**20
    assert temporaries(2**15)[0] <= 2 * 8 * 2**15 * 4  # the log-sum-exp before it is transposed


@DTYPES
@pytest.mark.parametrize(
    ("length", "heads", "batch", "head_dim", "is_causal"),
    [
        (8192, 20, 1, 128, True),
        (1029, 32, 8, 128, False),
        (2048, 16, 4, 96, True),
        (8192, 16, 2, 128, False),  # long blocks
    ],
)
@pytest.mark.parametrize("shifted", [False, True], ids=["mean 0", "shifted"])
def test_high_tiles(
    length: int, heads: int, batch: int, head_dim: int, is_causal: bool, shifted: bool, dtype: Any
):
    """Of so many rows: as the kernel that takes intervals by arrays, which has other tiles."""
    case = Case("high tiles", length, length, heads, heads // 4, head_dim, B=batch)
    inputs = case.inputs(dtype)
    if shifted:
        inputs = (inputs[0], *(1 + 0.3 * x for x in inputs[1:]))
    rows = jnp.arange(1, length + 1) if is_causal else jnp.full(length, length)
    ends = jnp.broadcast_to(rows.astype(jnp.int32), (batch, length))
    found = jax.jit(functools.partial(attention, is_causal=is_causal))(*inputs)
    other = jax.jit(functools.partial(attention, key_end=ends))(*inputs)
    eps = float(jnp.finfo(dtype).eps)
    for x, y, tolerance in zip(found, other, (2 * eps, 1e-5), strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_offset_is_run_time():
    """One program for every offset gives, bit by bit, what a program per offset gives."""
    case = CASES["long, window"]
    inputs = case.inputs(jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=4)
    def call(q: Array, k: Array, v: Array, traced: Any, static: Any) -> Any:
        offset = static if traced is None else traced
        return attention(q, k, v, is_causal=True, local_window_size=700, query_offset=offset)

    for offset in (-(2**31), -1900, -1, 1, 640, 2**31 - 1):
        assert equal(call(*inputs, jnp.int32(offset), None), call(*inputs, None, offset))


def test_vmap_is_batch():
    q, k, v = CASES["long, lengths"].inputs(jnp.bfloat16)
    qs = jnp.concatenate([q, q[:, ::-1], -q])[:, None]
    lengths = ints([700], [0], [2048])
    call = jax.jit(lambda q, n: attention(q, k, v, key_value_seq_lengths=n, is_causal=True))
    found = jax.jit(jax.vmap(call))(qs, lengths)
    for i in range(3):
        assert equal([x[i] for x in found], call(qs[i], lengths[i]))
