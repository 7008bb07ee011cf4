"""A dense bias on a Hopper GPU, and its gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from biases import BIASES, BiasCase, assert_right, inputs, oracles, with_gradients
from cases import CAUSAL, Case
from helpers import equal, poison

import jax_fa3

pytestmark = pytest.mark.gpu

attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)
both = jax.jit(oracles, static_argnums=0)


def of(case: Case, **options: Any) -> Any:
    """attention of four arrays."""
    arguments = case.arguments | options
    return functools.partial(lambda a, q, k, v, b: attention(q, k, v, b, **a), arguments)


def check(one: BiasCase, arrays: Any, rows: int = 64, **options: Any) -> Any:
    case, dtype = one.case, arrays[0].dtype
    cotangents = case.cotangents(dtype)
    poison(case, dtype)
    found = jax.jit(functools.partial(with_gradients, of(case, **options)))(cotangents, *arrays)
    assert found.dbias.dtype == arrays[3].dtype and found.dbias.shape == arrays[3].shape
    assert_right(found, both(case, arrays, cotangents), case, jnp.finfo(dtype).eps, rows)
    return found


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("one", BIASES, ids=str)
def test_table(one: BiasCase, dtype: Any):
    check(one, inputs(one, dtype))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 104, 128])
@pytest.mark.parametrize("values", ["means", "small"])
def test_values(values: str, head_dim: int):
    one = BiasCase(Case(values, 300, 333, H=head_dim, mask=CAUSAL), "1nts")
    change: Any = {"means": lambda x: 1 + 0.3 * x, "small": lambda x: 1e-3 * x}[values]
    check(one, tuple(map(change, inputs(one, jnp.bfloat16))))


@pytest.mark.parametrize("form", ["1nts", "bn1s", "111s"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_deterministic(form: str, head_dim: int):
    one = BiasCase(Case("deterministic", 700, 513, 8, 2, H=head_dim, B=3, mask=CAUSAL), form)
    arrays = inputs(one, jnp.bfloat16)
    first = check(one, arrays, deterministic_backward=True)
    call = functools.partial(with_gradients, of(one.case, deterministic_backward=True))
    again = jax.jit(call)(one.case.cotangents(jnp.bfloat16), *arrays)
    assert equal(first, again)


@pytest.mark.parametrize("wide", [True, False], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 104, 128])
def test_again_and_again(head_dim: int, wide: bool):
    """Slabs of the bias are overwritten as soon as they are read, hundreds of times a call: the forward and,
    in turn, the gradients are bit-equal in every call."""
    one = BiasCase(Case("again", 1000, 1000, 8, 2, H=head_dim, B=1, mask=CAUSAL), "1nts", wide)
    arrays, cotangents = inputs(one, jnp.bfloat16), one.case.cotangents(jnp.bfloat16)
    first = check(one, arrays, deterministic_backward=True)
    call = functools.partial(with_gradients, of(one.case, deterministic_backward=True))
    call = jax.jit(call)
    assert all(equal(first, call(cotangents, *arrays)) for _ in range(20))


def test_packed():
    one = BiasCase(Case("packed", 200, 200, 4, 4, H=64, mask=CAUSAL), "1nts")
    q, k, v, bias = inputs(one, jnp.bfloat16)
    cotangents = one.case.cotangents(jnp.bfloat16)

    def packed(q: Any, k: Any, v: Any, bias: Any) -> Any:
        qkv = jnp.stack((q, k, v), 2)
        options: Any = {"implementation": "fa3", "return_residual": True}
        return jax_fa3.qkv_dot_product_attention(qkv, bias=bias, **CAUSAL, **options)

    found = jax.jit(functools.partial(with_gradients, packed))(cotangents, q, k, v, bias)
    wanted = both(one.case, (q, k, v, bias), cotangents)
    assert_right(found, wanted, one.case, jnp.finfo(jnp.bfloat16).eps)


def test_other_dtype():
    """fp16 beside bfloat16: read as fp32."""
    one = BiasCase(Case("other", H=64), "1nts")
    *tensors, bias = inputs(one, jnp.bfloat16)
    check(one, (*tensors, bias.astype(jnp.float16)))


@pytest.mark.parametrize("form", ["1nts", "1n1s"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_numbers_that_are_not_finite_stay_where_they_are(form: str, head_dim: int):
    """An infinite cotangent of the first head's last row, whose gradient lies before the second head's;
    an infinite key of the second, whose query rows end in the middle of a block."""
    case = Case("infinite", 201, 261, 2, 2, B=1, H=head_dim)
    q, k, v, bias = inputs(BiasCase(case, form), jnp.bfloat16)
    dout, dlse = case.cotangents(jnp.bfloat16)
    call = jax.jit(functools.partial(with_gradients, of(case, deterministic_backward=True)))
    usual = call((dout, dlse), q, k, v, bias).dbias
    first = call((dout.at[:, -1, 0].set(jnp.inf), dlse), q, k, v, bias).dbias
    assert equal(first[:, 1], usual[:, 1])
    second = call((dout, dlse), q, k.at[:, 0, 1].set(jnp.inf), v, bias).dbias
    assert equal(second[:, 0], usual[:, 0])


def test_under_vmap():
    one = BiasCase(Case("vmap", 100, 130, H=64), "1nts")
    q, k, v, bias = inputs(one, jnp.bfloat16)
    call = functools.partial(with_gradients, of(one.case))
    cotangents = one.case.cotangents(jnp.bfloat16)
    found = jax.jit(jax.vmap(call, (None, 0, None, None, None)))(
        cotangents, jnp.stack((q, -q)), k, v, bias
    )
    for i, x in enumerate((q, -q)):
        entry = jax.tree.map(lambda y, i=i: y[i], found)
        wanted = both(one.case, (x, k, v, bias), cotangents)
        assert_right(entry, wanted, one.case, jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize("lead", [(1, 1), (2, 3), (2, 1), (1, 3)])
def test_several_batch_axes(lead: tuple[int, int]):
    """As one of them all, and its bias: the same bit by bit."""
    case = Case("batch axes", 100, 136, B=6, H=64, mask=CAUSAL)
    arrays, cotangents = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    bias = jax.random.normal(jax.random.key(0), (*lead, case.N, 100, 136), jnp.bfloat16)
    call = functools.partial(with_gradients, of(case, deterministic_backward=True))
    apart = [x.reshape(2, 3, *x.shape[1:]) for x in arrays]
    found = jax.jit(call)(tuple(x.reshape(2, 3, *x.shape[1:]) for x in cotangents), *apart, bias)

    def folded(q: Any, k: Any, v: Any, bias: Any) -> Any:
        whole = bias if lead == (1, 1) else jnp.broadcast_to(bias, (2, 3, *bias.shape[2:]))
        whole = whole.reshape(-1, *bias.shape[2:])
        return of(case, deterministic_backward=True)(q, k, v, whole)

    wanted = jax.jit(functools.partial(with_gradients, folded))(cotangents, *arrays, bias)
    for x, y in zip(found.results, wanted.results, strict=True):
        assert equal(x.reshape(y.shape), y)
    assert equal(found.dbias, wanted.dbias)
