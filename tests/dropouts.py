"""Cases with dropout, whose mask the oracle is given."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from biases import LONG, PAST, WINDOW
from cases import CAUSAL, Case
from jax import Array
from masks import documents, packed

from jax_fa3 import _dropout
from jax_fa3._operands import Operands

KEY = jax.random.key(7)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def kept(key: Any, rate: float, batch: int, heads: int, rows: int, keys: int) -> Array:
    """bool [B, N, T, S], by the XLA path's function."""
    dropout, words = _dropout.checked(rate, key)
    query = jnp.zeros((batch, rows, heads, 8), jnp.bfloat16)
    operands = _dropout.with_words(Operands(query, query[:, :, :1], query[:, :, :1]), words)
    assert operands.dropout is not None
    return _dropout.kept(operands.dropout, dropout, jnp.arange(rows), keys)


@dataclasses.dataclass(frozen=True, eq=False)
class DropoutCase(Case):
    """arguments are the oracle's, `options` the public function's."""

    rate: float = 0.1

    @property
    def arguments(self) -> dict[str, Any]:
        with jax.ensure_compile_time_eval():  # the oracle is jitted
            mask = kept(KEY, self.rate, self.B, self.N, self.T, self.S)
        rate = round(self.rate * _dropout.WHOLE) / _dropout.WHOLE
        return {**super().arguments, "kept": np.asarray(mask), "dropout_rate": rate}

    @property
    def options(self) -> dict[str, Any]:
        return {**super().arguments, "dropout_rate": self.rate, "dropout_key": KEY}


def _cases() -> list[DropoutCase]:
    documented = packed(documents(50, 40, 60, 50))
    broken = packed(documents(50, 40, 60, 50, ids=(0, 1, 0, 2)))
    sinks = (0.0, -2.0, 3.0, 1.5)
    table = [
        ("full", {"T": 300, "S": 390}),
        ("causal", {"T": 600, "S": 1100, "B": 1, "mask": CAUSAL}),
        ("odd", {"T": 199, "S": 261, "N": 6, "mask": CAUSAL, "rate": 0.5}),
        ("window", {"T": 300, "S": 333, "mask": WINDOW, "rate": 0.25}),
        ("segments", {"T": 200, "S": 200, "B": 1, "mask": documented}),
        ("broken run", {"T": 200, "S": 200, "B": 1, "mask": broken}),
        ("planted", {"B": 3, "mask": PAST, "planted": True}),
        ("planted, full", {"T": 300, "S": 384, "B": 3, "mask": LONG, "planted": True}),
        ("sinks", {"mask": CAUSAL, "sinks": sinks}),
        ("soft cap", {"T": 300, "mask": CAUSAL, "logits_soft_cap": 5.0}),
        ("one row", {"T": 1, "S": 300, "rate": 0.9}),
        ("one key head", {"T": 513, "S": 257, "N": 8, "K": 1}),
    ]
    cases = [DropoutCase(name, **sizes, H=h) for name, sizes in table for h in (64, 128)]
    cases += [DropoutCase("narrow", H=h, mask=CAUSAL) for h in (8, 32, 104, 120)]
    cases += [DropoutCase("value", H=128, V=64), DropoutCase("wide value", H=32, V=128)]
    return cases


DROPOUTS = _cases()
