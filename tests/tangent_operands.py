"""Every operand beside query, key and value under forward mode, with a tangent of its own where it has one;
shared by tests on CPUs and GPUs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from jax import Array

import jax_fa3

# The operands that move, and what does not.
Others = tuple[dict[str, Array], dict[str, Any]]


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _others(case: Case, dtype: Any) -> dict[str, Others]:
    b, t, s, n = case.B, case.T, case.S, case.N
    bias = normal(1, 1, n, t, s, dtype=dtype)
    sinks = jnp.arange(float(n)) / 2
    slopes = 0.5 ** jnp.arange(1.0, n + 1)
    several = jax.random.bernoulli(jax.random.key(2), 0.6, (b, 1, t, s))
    dropout = {"dropout_rate": 0.25, "dropout_key": jax.random.key(3)}
    causal, window = {"is_causal": True}, {"local_window_size": (s // 3, s // 4)}
    ids = [jnp.broadcast_to(jnp.arange(x) // 4, (b, x)) for x in (t, s)]
    lengths = {"key_value_seq_lengths": jnp.full(b, s - 3)}
    return {
        "segments": ({}, dict(zip(("query_segment_ids", "key_value_segment_ids"), ids, strict=True))),
        "sinks": ({"sinks": sinks}, {}),
        "bias": ({"bias": bias}, {}),
        "bias of each entry": ({"bias": normal(1, b, 1, t, s, dtype=dtype)}, causal | lengths),
        "alibi": ({"alibi_slopes": slopes}, {}),
        "alibi, sinks, window": ({"alibi_slopes": slopes, "sinks": sinks}, window),
        "relative bias": ({"relative_bias": normal(4, n, 11)}, {}),
        "mask, an interval a row": ({}, {"mask": jnp.tri(t, s, 1, dtype=bool)[None, None]}),
        "mask, several": ({"sinks": sinks}, {"mask": several}),
        "mask, several, soft cap": ({}, {"mask": several, "logits_soft_cap": 2.0}),
        "mask, several, bias": ({"bias": bias}, {"mask": several}),
        "dropout": ({}, dropout),
        "dropout, sinks": ({"sinks": sinks}, dropout | causal),
        "soft cap": ({}, {"logits_soft_cap": 2.0} | causal),
    }  # fmt: skip


CASE = Case("operands", 10, 14, 4, 2, 16, 8)
NAMES = tuple(_others(CASE, jnp.float16))


@dataclasses.dataclass(frozen=True)
class Attention:
    """A function of an implementation and of all that moves: query, key, value and what `names` names."""

    names: tuple[str, ...]
    fixed: dict[str, Any] = dataclasses.field(hash=False)

    def options(self, terms: Sequence[Array]) -> dict[str, Any]:
        return dict(zip(self.names, terms, strict=True)) | self.fixed

    def __call__(self, implementation: Any, *arrays: Array) -> tuple[Array, Array]:
        return jax_fa3.dot_product_attention(
            *arrays[:3],
            **self.options(arrays[3:]),
            implementation=implementation,
            return_residual=True,
        )


def pushed_operands(
    case: Case, name: str, dtype: Any
) -> tuple[Attention, tuple[Array, ...], tuple[Array, ...]]:
    """The function, what moves, and its tangents."""
    moving, options = _others(case, dtype)[name]
    primals = *case.inputs(dtype), *moving.values()
    terms = (normal(7, *x.shape, dtype=x.dtype) for x in moving.values())
    return Attention(tuple(moving), options), primals, (*case.inputs(dtype, seed=1), *terms)


def _twice(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(jnp.stack((x, -2 * x)) for x in arrays)


def _linearized(function: Any, primals: Any, tangents: Any) -> Any:
    results, linear = jax.linearize(function, *primals)
    return results, jax.jit(linear)(*tangents), jax.vmap(linear)(*_twice(tangents))


def _mapped(function: Any, primals: Any, tangents: Any) -> Any:
    """The query of more entries than all else has."""

    def of_query(query: Array, along: Array) -> Any:
        return jax.jvp(function, (query, *primals[1:]), (along, *tangents[1:]))

    return jax.vmap(of_query)(
        *map(jnp.stack, ((primals[0], -primals[0]), (tangents[0], tangents[0])))
    )


def _terms_alone(function: Any, primals: Any, tangents: Any) -> Any:
    if len(primals) == 3:
        return ()
    return jax.jvp(functools.partial(function, *primals[:3]), primals[3:], tangents[3:])


def _reversed(function: Any, primals: Any, tangents: Any) -> Any:
    """The gradient, by query, key and value, of what the jvp returns beside the tangent."""

    def loss(*primals: Array) -> Array:
        return jax.jvp(function, primals, tangents)[0][0].astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))(*primals)


WAYS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "jvp": lambda function, *pair: jax.jit(functools.partial(jax.jvp, function))(*pair),
    "remat": lambda function, *pair: jax.jvp(jax.checkpoint(function), *pair),
    "linearize": _linearized,
    "vmap": _mapped,
    "terms alone": _terms_alone,
    "both modes": _reversed,
}


def both(
    case: Case, name: str, way: str, dtype: Any, implementation: Any
) -> tuple[list[Any], list[Any]]:
    """What the implementation gives, and plain JAX."""
    attention, *pair = pushed_operands(case, name, dtype)
    found, exact = (
        jax.tree.leaves(WAYS[way](functools.partial(attention, x), *pair))
        for x in (implementation, "xla")
    )
    return found, exact


def assert_near(found: list[Any], exact: list[Any], of_largest: float) -> None:
    """Off by at most this part of an array's largest number, and what is not finite in the same places."""
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = (np.asarray(z.astype(jnp.float32)) for z in (x, y))
        ends = np.isfinite(y)
        np.testing.assert_array_equal(x[~ends], y[~ends])
        largest = np.abs(y[ends]).max(initial=1e-3)
        np.testing.assert_allclose(x[ends], y[ends], rtol=0, atol=of_largest * largest)
