"""Custom calls recorded from the functions that make them, so that tests which change something in them
(wrong_calls) follow every change of the targets by themselves."""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from call_operands import Struct


@dataclasses.dataclass(frozen=True)
class Call:
    target: str
    operands: tuple[Struct, ...]
    results: tuple[Struct, ...]
    aliases: dict[int, int]
    attributes: dict[str, Any]

    def run(self, device: Any) -> list[jax.Array]:
        """What it gives on this device, waited for."""
        call = jax.ffi.ffi_call(
            self.target, self.results, input_output_aliases=self.aliases or None
        )
        values = [
            jax.device_put(np.full(x.shape, 100 if x.dtype == jnp.int32 else 1, x.dtype), device)
            for x in self.operands
        ]
        return jax.block_until_ready(jax.jit(lambda *x: call(*x, **self.attributes))(*values))


def recorded(function: Callable[..., Any], *operands: Any) -> Call:
    """The last custom call that function makes."""
    return all_recorded(function, *operands)[-1]


def all_recorded(function: Callable[..., Any], *operands: Any) -> list[Call]:
    calls = []

    def ffi_call(target: str, results: Any, *, input_output_aliases: Any = None) -> Any:
        def call(*operands: Any, **attributes: Any) -> list[jax.Array]:
            structs = tuple(Struct(x.shape, x.dtype) for x in operands)
            aliases = dict(input_output_aliases or {})
            calls.append(Call(target, structs, tuple(results), aliases, attributes))
            return [jnp.zeros(x.shape, x.dtype) for x in results]

        return call

    with mock.patch.object(jax.ffi, "ffi_call", ffi_call):
        jax.eval_shape(lambda *x: function(*x), *operands)  # not from a cache
    return calls
