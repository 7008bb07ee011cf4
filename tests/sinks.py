"""Cases with sinks, beside the table: there is a gradient more."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import CAUSAL, Case
from helpers import Results, oracle
from jax import Array
from masks import documents, ints, key_lengths, packed

from jax_fa3 import _reference

WINDOW: dict[str, Any] = {"local_window_size": (40, 3)}
BEHIND: dict[str, Any] = {"is_causal": True, "query_offset": -130}  # the first rows see nothing


def _cases() -> list[Case]:
    far, near = (60.0, -300.0, 4.0, 20.0), (0.0, -2.0, 3.0, 1.5)
    past = {"query_seq_lengths": ints(77, 200, 0), **key_lengths(250, 129, 9), **CAUSAL}
    broken = packed(documents(50, 40, 60, 50, ids=(0, 1, 0, 2)))
    return [
        Case("sinks, causal", mask=CAUSAL, sinks=near),
        Case("sinks, full", H=128, sinks=near),
        Case("sinks, far", H=128, mask=CAUSAL, sinks=far),
        Case("sinks, soft cap", H=256, logits_soft_cap=3.0, mask=WINDOW, sinks=near),
        Case("sinks, planted", B=3, H=96, mask=past, planted=True, sinks=near),
        Case("sinks, broken run", 200, 200, B=1, H=128, mask=broken, sinks=near),
        Case("sinks, no keys", H=192, V=128, mask=BEHIND, sinks=far),
        Case("sinks, S = 0", S=0, sinks=near),
        Case("sinks, wide", H=512, mask=CAUSAL, sinks=near),
        Case("sinks, long", 2048, 2048, B=1, mask={"local_window_size": (127, 0)}, sinks=near),
        Case("sinks, long, 256", 1100, 2048, B=1, H=256, sinks=near),
    ]


SINKS = _cases()


def inputs(case: Case, dtype: Any) -> tuple[Array, ...]:
    """query, key, value and sinks."""
    return *case.inputs(dtype), jnp.asarray(case.sinks, jnp.promote_types(dtype, jnp.float32))


class WithSinks(NamedTuple):
    results: Results
    dsinks: Any  # [N]


def with_gradients(function: Any, cotangents: Any, *inputs: Array) -> WithSinks:
    """As helpers.with_gradients, of a function of sinks, too."""
    results, pullback = jax.vjp(function, *inputs)
    *grads, dsinks = pullback(cotangents)
    return WithSinks(Results(*results, *grads), dsinks)


@functools.partial(jax.jit, static_argnums=0)
def exact(case: Case, arrays: Any, cotangents: Any) -> WithSinks:
    """By the oracle in fp32, or in fp64 for fp64."""
    wide = jnp.promote_types(arrays[0].dtype, jnp.float32)
    *tensors, sinks = (x.astype(wide) for x in arrays)
    upper = tuple(x.astype(wide) for x in cotangents)

    def of_sinks(sinks: Array) -> Any:
        return _reference.attention(*tensors, **case.arguments | {"sinks": sinks})

    with jax.default_matmul_precision("highest"):
        (dsinks,) = jax.vjp(of_sinks, sinks)[1](upper)
        return WithSinks(oracle(case, wide, tensors, upper), dsinks)


def assert_gradient(found: WithSinks, exact: WithSinks, sinks: Any, cotangents: Any) -> None:
    """That of sinks. Of each row it has the sum of dout * out, where out is rounded to dout's dtype: the
    errors of many rows add up as independent ones do. One number a head is too few for the rule."""
    dout, dlse = (np.asarray(x, np.float64) for x in cotangents)
    out, lse = (np.asarray(x, np.float64) for x in exact.results[:2])
    sees = np.isfinite(lse)
    weights = np.where(sees, np.exp(np.asarray(sinks, np.float64) - np.where(sees, lse, 0)), 0)
    out = np.where(sees[..., None], out, 0)
    rounded = (np.where(sees[..., None], dout, 0) * out) ** 2
    unit = jnp.finfo(cotangents[0].dtype).eps * np.sqrt((weights**2 * rounded.sum(-1)).sum((0, 1)))
    terms = np.abs(weights * np.where(sees, dlse, 0)).sum((0, 1))  # summed in fp32
    assert (np.abs(found.dsinks - exact.dsinks) <= 2 * unit + 1e-5 * terms + 1e-30).all()
