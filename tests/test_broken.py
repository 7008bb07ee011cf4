"""Rows of broken segments: NaN, whose derivative is NaN as well, but 0 where nothing comes in."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from masks import MARK, documents, packed

import jax_fa3
from jax_fa3 import _broken

NAN = np.nan
X = jnp.array([0.0, -0.0, 1.0, -2.0, NAN, jnp.inf, 1.2e-38])
TIMES_NAN = [0, 0, NAN, NAN, NAN, NAN, NAN]


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        jax.jit,
        jax.vmap,
        lambda f: lambda x: jax.jvp(f, (jnp.ones_like(x),), (x,))[1],
        lambda f: lambda x: jax.vjp(f, jnp.zeros_like(x))[1](x)[0],
        lambda f: lambda x: jax.linear_transpose(f, x)(x)[0],
        lambda f: lambda x: jax.linearize(f, jnp.ones_like(x))[1](x),
        lambda f: lambda x: jax.jvp(lambda y: jax.jvp(f, (x,), (y,))[1], (x,), (x,))[1],
        lambda f: lambda x: jax.lax.map(f, x),
    ],
    ids=["", "jit", "vmap", "jvp", "vjp", "transpose", "linearize", "twice", "map"],
)
def test_times_nan(transform: Any):
    np.testing.assert_array_equal(transform(_broken.times_nan)(X), TIMES_NAN)


def test_times_nan_on_meshes():
    mesh = jax.make_mesh((7,), ("x",), devices=jax.devices()[:7])  # of explicit axes
    sharded = jax.device_put(X, jax.NamedSharding(mesh, jax.P("x")))
    gradient = jax.grad(lambda x: (_broken.times_nan(x) * sharded).sum())
    with jax.set_mesh(mesh):
        for function in (gradient, jax.jit(gradient)):
            found = function(jnp.zeros_like(sharded))
            assert found.sharding.spec == jax.P("x")
            np.testing.assert_array_equal(found, TIMES_NAN)
    specs: Any = {"mesh": mesh, "in_specs": jax.P("x"), "out_specs": jax.P("x")}
    found = jax.jit(jax.shard_map(_broken.times_nan, **specs))(sharded)
    np.testing.assert_array_equal(found, TIMES_NAN)


def test_marked():
    """Two numbers that happen to be the mark's stay an empty interval."""
    begin, end = jnp.array([MARK[0], MARK[0], 3]), jnp.array([MARK[1], MARK[1], 5])
    begin, end = _broken.marked(jnp.array([True, False, False]), begin, end)
    assert (begin[0], end[0]) == MARK and (begin[2], end[2]) == (3, 5)
    assert begin[1] >= end[1]
    np.testing.assert_array_equal(_broken.is_broken(begin, end), [True, False, False])


def test_row_sums():
    dout = jnp.array([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]], jnp.bfloat16).reshape(1, 3, 1, 2)
    out = jnp.array([[NAN, jnp.inf], [5.0, NAN], [1.0, NAN]], jnp.bfloat16).reshape(1, 3, 1, 2)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = _broken.row_sums(dout, out, jnp.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [[[0, 10, NAN]]])


# Rows 0, 1, 6 and 7 are those of a broken run; rows 4 and 5 see nothing.
T, N, H, V = 8, 2, 4, 3
MASK: Any = packed(documents(2, 2, 2, 2, ids=(0, 1, -1, 0)))
BROKEN = np.array([1, 1, 0, 0, 0, 0, 1, 1], bool)
attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="xla", return_residual=True, **MASK
)
Q, K_, V_ = (
    jax.random.normal(jax.random.key(i), shape) + 0.5
    for i, shape in enumerate([(1, T, N, H), (1, T, 1, H), (1, T, 1, V)])
)


def rows_that_are_nan(x: Array) -> np.ndarray:
    """[T, N] of [1, T, N, ...]; a row is NaN as a whole, or finite."""
    nan = np.isnan(np.asarray(x)).reshape(T, N, -1)
    np.testing.assert_array_equal(nan.any(-1), nan.all(-1))
    return np.asarray(nan.all(-1))


# What comes in: cotangents of one number of out, of two that cancel, of the log-sum-exp, each in one
# head of some rows; and which heads of the broken rows then have NaN.
def cotangents(case: str) -> tuple[Array, Array, np.ndarray]:
    dout, dlse, nan = np.zeros((1, T, N, V)), np.zeros((1, T, N)), np.zeros((T, N), bool)
    dout[:, 2:6], dlse[:, 2:4] = 0.7, -0.3
    if case in ("one", "all"):
        dout[0, 0, 1, 2], nan[0, 1] = 1e-30, True
    if case in ("cancel", "all"):
        dout[0, 1, 0, :2], nan[1, 0] = (1, -1), True
    if case in ("lse", "all"):
        dlse[0, 7, 1], nan[7, 1] = 4, True
    if case in ("nan", "all"):
        dout[0, 6, 0], nan[6, 0] = NAN, True
    return jnp.asarray(dout, jnp.float32), jnp.asarray(dlse, jnp.float32), nan


CASES = ["none", "one", "cancel", "lse", "nan", "all"]


def test_results():
    out, lse = attention(Q, K_, V_)
    for x in (out, lse):
        np.testing.assert_array_equal(rows_that_are_nan(x), BROKEN[:, None] & np.ones(N, bool))
    assert not out[:, 4:6].any() and (lse[:, 4:6] == -jnp.inf).all()


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("case", CASES)
def test_reverse_mode(case: str, implementation: Any):
    """The XLA path's own derivative, and the custom_vjp's backward; the other rows' gradients are
    those without the broken ones."""
    dout, dlse, nan = cotangents(case)
    call = functools.partial(attention, implementation=implementation)
    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        grads = jax.vjp(wrap(call), Q, K_, V_)[1]((dout, dlse))
        np.testing.assert_array_equal(rows_that_are_nan(grads[0]), nan)
        assert (np.asarray(grads[0])[0, BROKEN][~nan[BROKEN]] == 0).all()
        assert not grads[0][:, 4:6].any() and np.asarray(grads[0])[0, 2:4].any(-1).all()
        alone = jax.vjp(call, *(x.at[:, BROKEN].set(0) for x in (Q, K_, V_)))[1]
        clean = alone((dout.at[:, BROKEN].set(0), dlse.at[:, BROKEN].set(0)))
        for x, y in zip(grads, clean, strict=True):
            x, y = (np.asarray(a)[:, 2:6] for a in (x, y))
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        assert all(np.isfinite(x).all() for x in grads[1:])


@pytest.mark.parametrize("tangent", ["none", "one", "cancel"])
def test_forward_mode(tangent: str):
    """A row's tangent is NaN if that of its query is not 0, in jvp, jacfwd and linearize."""
    t, nan = jnp.zeros_like(Q).at[:, 2:6].set(1.0), np.zeros((T, N), bool)
    if tangent == "one":
        t, nan[7, 0] = t.at[0, 7, 0, 3].set(1e-30), True
    if tangent == "cancel":
        t, nan[1, 1] = t.at[0, 1, 1, :2].set(jnp.array([1.0, -1.0])), True
    call = functools.partial(attention, key=K_, value=V_)
    for function in (call, jax.jit(call)):
        along = jax.jvp(function, (Q,), (t,))[1]
        linear = jax.linearize(function, Q)[1](t)
        mapped = jax.vmap(lambda t, f=function: jax.jvp(f, (Q,), (t,))[1])(t[None])
        for out, lse in (along, linear, [x[0] for x in mapped]):
            np.testing.assert_array_equal(rows_that_are_nan(out), nan)
            np.testing.assert_array_equal(rows_that_are_nan(lse), nan)
    keys = jnp.ones_like(K_), jnp.ones_like(V_)
    out, _ = jax.jvp(lambda k, v: attention(Q, k, v), (K_, V_), keys)[1]
    assert not rows_that_are_nan(out).any() and np.asarray(out)[0, 2:4].any()


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
def test_jacobian(jacobian: Any):
    """NaN from a broken row to itself, 0 from and to every other row."""
    found = jacobian(lambda q: attention(q, K_, V_)[0])(Q)[0, :, :, :, 0]  # [T, N, V, T, N, H]
    nan = np.isnan(found)
    wanted = np.zeros((T, N, T, N), bool)
    for row in np.flatnonzero(BROKEN):
        for head in range(N):
            wanted[row, head, row, head] = True
    np.testing.assert_array_equal(nan, np.broadcast_to(wanted[:, :, None, :, :, None], nan.shape))
    assert not np.asarray(found)[:, :, :, BROKEN][~nan[:, :, :, BROKEN]].any()


def masked_loss(rows: np.ndarray) -> Any:
    def loss(*qkv: Array) -> Array:
        out, lse = attention(*qkv)
        out = jnp.where(rows[None, :, None, None], out, 0)
        return (out**2).sum() + jnp.where(rows[None, :, None], lse, 0)[:, 2:4].sum()

    return loss


@pytest.mark.parametrize("order", ["hessian", "reverse twice", "forward twice", "vmap"])
def test_second_derivatives(order: str):
    """A loss of the rows that are right: finite, and the same as without the others."""
    loss = masked_loss(~BROKEN)
    second: Any = {
        "hessian": jax.hessian(loss),
        "reverse twice": jax.jacrev(jax.grad(loss)),
        "forward twice": jax.jacfwd(jax.jacfwd(loss)),
        "vmap": lambda *qkv: jax.vmap(jax.hessian(loss))(*(x[None] for x in qkv))[0],
    }[order]
    found = jax.jit(second)(Q, K_, V_)
    clean = jax.jit(second)(*(x.at[:, BROKEN].set(0) for x in (Q, K_, V_)))
    assert np.asarray(found).any()
    np.testing.assert_allclose(found, clean, rtol=1e-4, atol=1e-5)
    # Of all rows: NaN in the broken rows of query, and there alone.
    whole = jax.hessian(masked_loss(np.ones(T, bool)))(Q, K_, V_)
    nan = np.isnan(whole).any((0, 2, 3, 4, 5, 6, 7))
    np.testing.assert_array_equal(nan, BROKEN)


def test_under_strict_modes():
    dout, dlse, nan = cotangents("all")
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        broken = jnp.asarray(BROKEN)[None, :, None, None]
        call = functools.partial(_broken.nan_rows, broken, columns=V)
        (out, lse), pullback = jax.vjp(call, Q)
        assert (out.shape, lse.shape) == ((1, T, N, V), (1, T, N, 1))
        dq = pullback((dout, dlse[..., None]))[0]
        touched = _broken.touched(dout, dlse)[0]
    np.testing.assert_array_equal(rows_that_are_nan(dq), nan)
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(np.asarray(broken), out.shape))
    np.testing.assert_array_equal(touched & BROKEN[:, None], nan)
