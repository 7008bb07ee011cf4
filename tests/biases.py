"""Cases with a dense bias, beside the table: one operand and one gradient more."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import CAUSAL, Case
from helpers import Results, assert_rounded
from jax import Array, lax
from masks import documents, ints, key_lengths, packed

from jax_fa3 import _reference

WINDOW: dict[str, Any] = {"local_window_size": (40, 3)}
PAST: dict[str, Any] = {"query_seq_lengths": ints(77, 200, 0), **key_lengths(250, 129, 9), **CAUSAL}
LONG: dict[str, Any] = {"query_seq_lengths": ints(77, 200, 0)}


@dataclasses.dataclass(frozen=True, eq=False)
class BiasCase:
    """form: the letters of bias's dimensions, 1 where it is broadcast."""

    case: Case
    form: str = "bnts"
    wide: bool = False  # fp32, else query's dtype
    hides: bool = False  # -inf and dtypes' least numbers in it, and whole rows of them

    def __str__(self) -> str:
        marks = " fp32" * self.wide + " hides" * self.hides
        return f"{self.case}, {self.case.H}, {self.form}{marks}"


def _cases() -> list[BiasCase]:
    sinks = (0.0, -2.0, 3.0, 1.5)
    broken = packed(documents(50, 40, 60, 50, ids=(0, 1, 0, 2)))
    forms = ["bnts", "1nts", "b1ts", "11ts", "bn1s", "1n1s", "b11s", "111s", "1nt1"]
    dims = [64, 128, 104, 120, 112, 72, 80, 96, 88]
    table = [
        BiasCase(Case("causal", H=128, mask=CAUSAL), "1nts"),
        BiasCase(Case("odd", 199, 261, H=128), "1nts", hides=True),
        BiasCase(Case("odd", 77, 133, H=64, mask=CAUSAL), "bnts", wide=True, hides=True),
        BiasCase(Case("planted", B=3, H=64, mask=PAST, planted=True), "1nts"),
        BiasCase(Case("planted", B=3, H=128, mask=PAST, planted=True), "bnts", wide=True),
        # Not causal: blocks of keys that every row sees, but those past the length.
        BiasCase(Case("planted, full", 300, 384, B=3, H=64, mask=LONG, planted=True), "bnts"),
        BiasCase(Case("planted, full", 300, 384, B=3, H=128, mask=LONG, planted=True), "1nts"),
        BiasCase(Case("window", 300, 333, H=128, mask=WINDOW), "1n1s", hides=True),
        BiasCase(Case("broken run", 200, 200, B=1, H=128, mask=broken), "1nts"),
        BiasCase(Case("sinks", H=128, mask=CAUSAL, sinks=sinks), "1nts", hides=True),
        BiasCase(Case("one row", 1, 300, H=64), "bnts"),
        BiasCase(Case("long", 600, 1100, B=1, H=128, mask=CAUSAL), "bnts", hides=True),
        BiasCase(Case("value", H=128, V=64), "1nts", hides=True),
        BiasCase(Case("value", H=96, V=80, mask=CAUSAL), "1nts", hides=True),
        BiasCase(Case("planted", B=3, H=80, mask=PAST, planted=True), "bnts"),
        BiasCase(Case("long", 600, 1100, B=1, H=96, mask=CAUSAL), "bnts", hides=True),
    ]
    table += [
        BiasCase(Case("heads", 150, 270, 6, 2, H=h, mask=(CAUSAL, {})[i % 2]), f, i % 2 == 0, i > 2)
        for i, h in enumerate(dims)
        for f in forms[i::4]
    ]
    return table


BIASES = _cases()


def inputs(of: BiasCase, dtype: Any) -> tuple[Array, ...]:
    """query, key, value and bias; NaN in what of it nobody sees."""
    case = of.case
    sizes = {"b": case.B, "n": case.N, "t": case.T, "s": case.S, "1": 1}
    shape = tuple(sizes[letter] for letter in of.form)
    rng = np.random.default_rng(len(str(of)))
    dtype_of_bias = jnp.dtype(jnp.float32 if of.wide else dtype)
    bias = 2 * rng.standard_normal(shape, np.float32) + rng.standard_normal(shape[:1] + (1, 1, 1))
    if of.hides:
        least = [-np.inf] if dtype_of_bias == jnp.float16 else [-np.inf, -3e38]
        bias = np.where(rng.random(shape) < 0.2, rng.choice(least, shape), bias)
        bias = np.where(rng.random((*shape[:3], 1)) < 0.1, -np.inf, bias)
    if of.form == "bnts" and case.mask:
        masks = {k: v for k, v in case.mask.items() if k != "sinks"}
        visible, _ = _reference.visible_keys(case.B, case.T, case.S, **masks)
        bias = np.where(visible[:, None], bias, np.nan)
    return *case.inputs(dtype), jnp.asarray(bias, dtype_of_bias)


class WithBias(NamedTuple):
    results: Results
    dbias: Any


def with_gradients(function: Any, cotangents: Any, *arrays: Array) -> WithBias:
    found, pullback = jax.vjp(function, *arrays)
    *grads, dbias = pullback(cotangents)
    return WithBias(Results(*found, *grads), dbias)


def oracles(case: Case, arrays: Any, cotangents: Any) -> tuple[WithBias, WithBias]:
    """In fp32, and with its steps rounded to query's dtype, as helpers.oracle has them."""
    dtype, wide = arrays[0].dtype, [x.astype(jnp.float32) for x in arrays]
    dout, dlse = (x.astype(jnp.float32) for x in cotangents)

    def function(round_to: Any, q: Array, k: Array, v: Array, bias: Array) -> Any:
        return _reference.attention(q, k, v, **case.arguments, bias=bias, round_to=round_to)

    with jax.default_matmul_precision("highest"):
        exact = with_gradients(jax.tree_util.Partial(function, None), (dout, dlse), *wide)
        out = function(dtype, *wide)[0]
        change = jnp.nan_to_num(dout) * jnp.nan_to_num(out - exact.results.out)
        call = lambda *x: function(dtype, *x)
        rounded = with_gradients(call, (dout, dlse - change.sum(-1)), *wide)
    narrow = [lax.optimization_barrier(x.astype(dtype)) for x in rounded.results[2:]]
    dbias = lax.optimization_barrier(rounded.dbias.astype(arrays[3].dtype))
    results = Results(*rounded.results[:2], *(x.astype(jnp.float32) for x in narrow))
    return exact, WithBias(results, dbias.astype(jnp.float32))


def assert_right(
    found: WithBias, wanted: tuple[WithBias, WithBias], case: Case, eps: Any, rows: int = 64
) -> None:
    """By the rule of tolerance; wanted: from oracles."""
    exact, rounded = wanted
    assert_rounded(found.results, exact.results, rounded.results, case, eps, rows)
    nothing: Any = None
    grads = [Results(jnp.swapaxes(x.dbias, 1, 2), nothing) for x in (found, exact, rounded)]
    assert_rounded(grads[0], grads[1], grads[2], case, eps, max(rows, 64))
