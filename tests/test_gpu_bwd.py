"""The backward kernels on a Hopper GPU; the whole table is in test_gpu_fwd.py."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, TABLE, Case, key_lengths
from helpers import equal, temporary_bytes, with_gradients
from jax import Array
from jax.test_util import check_grads
from long_cases import LONG
from masks import documents, ints, packed

import jax_fa3

pytestmark = pytest.mark.gpu

CASES = {case.name: case for case in [*TABLE, *LONG]}
attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)


def gradients(case: Case, dtype: Any = jnp.bfloat16, **options: Any) -> tuple[Any, Any]:
    """A jitted function of cotangents and inputs to (out, lse, dq, dk, dv), and its arguments."""
    call = functools.partial(attention, **case.arguments, **options)
    arguments = case.cotangents(dtype), *case.inputs(dtype)
    return jax.jit(functools.partial(with_gradients, call)), arguments


def bits(x: Array) -> np.ndarray:
    return np.asarray(x).view(np.uint16)


@pytest.mark.parametrize(
    "name", ["causal", "window and causal", "soft cap", "K = 1", "head dims 256, 256"]
)
def test_check_grads(name: str):
    """The kernels' gradients against differences of the XLA path in fp32."""
    case = CASES[name]
    plain = functools.partial(attention, **case.arguments, implementation="xla")
    kernels = functools.partial(attention, **case.arguments)

    def forward(*tensors: Array) -> Any:
        rounded = [x.astype(jnp.bfloat16) for x in tensors]
        return plain(*tensors), jax.vjp(kernels, *rounded)[1]

    def backward(pullback: Any, cotangents: Any) -> Any:
        dout, dlse = cotangents
        return tuple(x.astype(jnp.float32) for x in pullback((dout.astype(jnp.bfloat16), dlse)))

    function = jax.custom_vjp(plain)
    function.defvjp(forward, backward)
    tensors = [x.astype(jnp.float32) for x in case.inputs(jnp.bfloat16)]
    with jax.default_matmul_precision("highest"):
        check_grads(function, tensors, order=1, modes=("rev",), atol=0.02, rtol=0.02, eps=1e-2)


DETERMINISTIC = [
    *("long, causal", "long, documents", "long, full", "any intervals", "planted, causal"),
    *(
        "long, prefix-LM",
        "long, 192 and 128",
        "long, 80, documents",
        "long, window",
        "head dims 40, 40",
        "K = 1",
    ),
]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic(name: str):
    """Bit-equal, 100 times over."""
    call, arguments = gradients(CASES[name], deterministic_backward=True)
    first = call(*arguments)

    @jax.jit
    def same(x: Any, y: Any) -> Array:
        pairs = zip(x, y, strict=True)
        return jnp.array([jnp.array_equal(a, b, equal_nan=True) for a, b in pairs]).all()

    repeats = [same(first, call(*arguments)) for _ in range(100)]
    assert all(repeats)
    assert equal(first, call(*arguments))


@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("heads", [(8, 8), (32, 8)], ids=["MHA", "GQA"])
@pytest.mark.parametrize("mask", [{}, CAUSAL, {"local_window_size": (300, 0)}], ids=str)
def test_deterministic_in_more_ctas_than_run_at_once(mask: Any, heads: Any, head_dim: int):
    """512 CTAs: bit-equal, and what any order gives but for rounding."""
    n, k = heads
    case = Case("many", 2048, 2048, n, k, head_dim, B=4, mask=mask)
    call, arguments = gradients(case, deterministic_backward=True)
    in_any_order = gradients(case)[0](*arguments)
    first = call(*arguments)
    assert all(equal(first, call(*arguments)) for _ in range(5))
    found, wanted = (np.asarray(x.dq, np.float32) for x in (first, in_any_order))
    np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=2**-9 * np.abs(wanted).max())


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_dk_and_dv_are_always_bit_equal(head_dim: int):
    call, arguments = gradients(Case("repeats", 1024, 1024, 4, 4, head_dim, B=4, mask=CAUSAL))
    first = call(*arguments)

    @jax.jit
    def same(x: Any, y: Any) -> Array:
        return jnp.array_equal(x.dk, y.dk) & jnp.array_equal(x.dv, y.dv)

    repeats = [same(first, call(*arguments)) for _ in range(1000)]
    assert all(repeats)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("planted", [False, True])
def test_what_nobody_sees_has_no_gradient(head_dim: int, planted: bool):
    """Exactly 0: padding, rows that see nothing, keys that nobody sees; NaN there changes nothing."""
    mask = {"query_seq_lengths": ints(100, 200), **key_lengths(70, 150)}
    case = Case("zeros", 200, 200, 4, 2, head_dim, mask=mask, planted=planted)
    call, arguments = gradients(case)
    found = call(*arguments)
    for i, (rows, keys) in enumerate([(100, 70), (200, 150)]):
        assert not np.any(bits(found.dq[i, rows:]) & 0x7FFF)
        assert not np.any(bits(found.dk[i, keys:]) & 0x7FFF)
        assert not np.any(bits(found.dv[i, keys:]) & 0x7FFF)
        assert np.isfinite(np.asarray(found.dq, np.float32)).all() and np.any(bits(found.dq[i]))

    ids = documents(50, 60, 90, ids=(3, -1, 5))
    other = documents(80, 40, 80, ids=(3, 7, 5))  # nobody asks for 7
    case = Case("segments", 200, 200, 2, 2, head_dim, B=1, mask=packed(ids, other))
    call, arguments = gradients(case)
    found = call(*arguments)
    assert not np.any(bits(found.dq[:, 50:110]) & 0x7FFF)
    assert not np.any(bits(found.dk[:, 80:120]) & 0x7FFF)
    assert not np.any(bits(found.dv[:, 80:120]) & 0x7FFF)


@pytest.mark.parametrize(("head_dim", "length"), [(128, 20480), (192, 16384)])
def test_turns_of_splits(head_dim: int, length: int):
    """Where the first row that sees a key comes earlier the later the key is, as of reversed text,
    turns to add to dQ alternate between the CTAs that share a block of keys."""
    begin = jnp.arange(length - 1, -1, -1, dtype=jnp.int32)[None]
    case = Case("reversed", length, length, 1, 1, head_dim, B=1, mask={"key_begin": begin})
    call, arguments = gradients(case, deterministic_backward=True)
    found, again = call(*arguments), call(*arguments)
    assert all(map(equal, found, again))
    other, _ = gradients(case)
    for x, y in zip(found, other(*arguments), strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=2**-7, atol=2**-8 * np.abs(y).max())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_broken_rows_without_cotangents(head_dim: int, deterministic: bool):
    """dq of a broken run's row and head is 0 if nothing comes in, else NaN; every other gradient is
    that without the broken rows."""
    ids = documents(70, 100, 30, ids=(0, 1, 0))
    case = Case("two runs of 0", 200, 200, 4, 2, head_dim, B=1, mask=packed(ids))
    call, ((dout, dlse), *inputs) = gradients(case, deterministic_backward=deterministic)
    text = jnp.asarray(ids == 1)[None, :, None]
    clean = jnp.where(text[..., None], dout, 0), jnp.where(text, dlse, 0)
    exact = call(clean, *inputs)
    assert not np.any(bits(exact.dq)[:, ids == 0] & 0x7FFF)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in exact[2:])
    assert np.asarray(exact.dq, np.float32)[:, ids == 1].any((0, 2, 3)).all()
    # One number of out, two that cancel, the log-sum-exp, NaN: each in one head of one row.
    dout, dlse = clean
    dout = dout.at[0, 3, 1, 5].set(1e-30).at[0, 64, 0, :2].set(jnp.array([1, -1], dout.dtype))
    dout, dlse = dout.at[0, 199, 2].set(jnp.nan), dlse.at[0, 180, 3].set(-2)
    found = call((dout, dlse), *inputs)
    nan = np.zeros((200, 4), bool)
    nan[[3, 64, 199, 180], [1, 0, 2, 3]] = True
    isnan = np.isnan(np.asarray(found.dq, np.float32))[0]
    np.testing.assert_array_equal(isnan.all(-1), nan)
    np.testing.assert_array_equal(isnan.any(-1), nan)
    assert not np.any(bits(found.dq)[0][(ids == 0)[:, None] & ~nan] & 0x7FFF)
    if deterministic:
        assert equal(found.dq[:, ids == 1], exact.dq[:, ids == 1])
    assert equal((found.dk, found.dv), (exact.dk, exact.dv))


def test_padding_segment_id():
    """Bit by bit what ids below 0 give."""
    ids = documents(70, 100, 30, ids=(0, 1, 0))
    case = Case("padding 0", 200, 200, 4, 2, 64, B=1, mask=packed(ids))
    call, arguments = gradients(case, padding_segment_id=0, deterministic_backward=True)
    other = dataclasses.replace(case, mask=packed(np.where(ids == 0, -1, ids)))
    exact = gradients(other, deterministic_backward=True)[0](*arguments)
    assert equal(call(*arguments), exact)
    assert not np.any(bits(exact.out)[:, ids == 0] & 0x7FFF)


def loss(qkv: Array, num_kv_heads: int) -> Array:
    out = jax_fa3.qkv_dot_product_attention(qkv, num_kv_heads, is_causal=True, implementation="fa3")
    return out.sum(dtype=jnp.float32)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed_is_one_gradient_without_copies(head_dim: int):
    qkv = jax.random.normal(jax.random.key(0), (2, 300, 8, head_dim), jnp.bfloat16)
    text = jax.jit(jax.grad(loss), static_argnums=1).lower(qkv, 2).compile().as_text()
    assert text is not None and text.count('custom_call_target="jax_fa3.bwd_packed.v1"') == 1
    # Nothing else makes, moves or copies an array of the gradient's shape.
    shape = rf"bf16\[2,300,8,{head_dim}\]"
    made = re.findall(rf"= {shape}\S* ([a-z-]+)\(", text)
    assert set(made) <= {"parameter", "get-tuple-element", "bitcast"}


def test_memory_is_linear():
    def temporaries(length: int, head_dim: int) -> int:
        case = Case("memory", length, length, 8, 2, head_dim, B=1)
        inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in case.shapes[:3]]
        call = functools.partial(attention, **CAUSAL)
        return temporary_bytes(
            jax.grad(lambda *x: call(*x)[0].sum(dtype=jnp.float32), (0, 1, 2)), *inputs
        )

    for head_dim in (64, 128, 256):
        once, twice = (temporaries(length, head_dim) for length in (2**16, 2**17))
        assert twice < 2.1 * once + 2**20


def test_second_derivatives_are_refused():
    q, k, v = CASES["causal"].inputs(jnp.bfloat16)
    call = functools.partial(jax_fa3.dot_product_attention, implementation="fa3")
    with pytest.raises(Exception, match="implementation='xla'"):
        jax.jit(jax.grad(lambda q: jax.grad(lambda q: call(q, k, v).sum())(q).sum()))(q)
