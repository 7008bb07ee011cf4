"""Each guard lets the right uses pass unchanged and refuses the others with the way out."""

import jax
import jax.numpy as jnp
import pytest

from jax_fa3 import _guards

X = jnp.arange(3.0)
ONLY_REVERSE = r"reverse mode only \(jax.grad, jax.vjp\).*use implementation='xla'"


def reverse(x):
    return jnp.sin(_guards.reverse_mode_only(x)).sum()


@pytest.mark.parametrize(
    "derivative",
    [
        jax.grad(reverse),
        jax.jit(jax.grad(reverse)),
        lambda x: jax.grad(lambda x: jax.vmap(reverse)(x[:, None]).sum())(x),
        lambda x: jax.vmap(jax.grad(reverse))(x[:, None])[:, 0],
        jax.grad(jax.checkpoint(reverse)),
        jax.grad(lambda x: jax.lax.scan(lambda c, y: (c + reverse(y), None), 0.0, x)[0]),
        lambda x: jnp.diag(jax.jacrev(jax.vmap(reverse))(x)),
    ],
)
def test_reverse_mode_passes(derivative):
    assert jnp.allclose(derivative(X), jnp.cos(X))


@pytest.mark.parametrize(
    "derivative",
    [
        lambda x: jax.jvp(reverse, (x,), (x,)),
        jax.jit(lambda x: jax.jvp(reverse, (x,), (x,))),
        jax.jacfwd(reverse),
        lambda x: jax.linearize(reverse, x)[1](x),
        jax.hessian(reverse),
        jax.grad(lambda x: jax.jvp(reverse, (x,), (x,))[1]),
        lambda x: jax.lax.scan(lambda c, y: (c, jax.jvp(reverse, (y,), (y,))), 0.0, x),
    ],
)
def test_forward_mode_is_refused(derivative):
    with pytest.raises(NotImplementedError, match=ONLY_REVERSE):
        derivative(X)


def test_undifferentiated_operand_passes():
    def function(x, y):
        return x * reverse(y)

    assert jnp.allclose(jax.jvp(lambda x: function(x, X), (1.0,), (1.0,))[1], reverse(X))


def test_not_differentiable():
    def function(x):
        return _guards.not_differentiable(x).sum()

    assert jax.vmap(function)(X[:, None]).sum() == jax.jit(function)(X) == 3
    with pytest.raises(NotImplementedError, match=ONLY_REVERSE):
        jax.grad(function)(X)


def test_never_lowered():
    def function(x):
        return 2 * _guards.never_lowered(x)

    assert jax.eval_shape(jax.vmap(function), X).shape == (3,)
    with pytest.raises(NotImplementedError, match="is being lowered for platform cpu"):
        jax.jit(function).trace(X).lower(lowering_platforms=("cpu",))
