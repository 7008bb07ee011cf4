"""JAX's modes, and what calls.py's functions give in them: shared by tests on CPUs and GPUs."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from calls import CALLS, PLAIN
from calls_without_derivative import WITHOUT_DERIVATIVE

EVERY = CALLS | PLAIN | WITHOUT_DERIVATIVE
_COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def strict() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@contextlib.contextmanager
def debug() -> Iterator[None]:
    with jax.debug_infs(True), jax.debug_nans(True):
        yield


def results(name: str, implementation: Any, *qkv: Any) -> Any:
    """Of one of EVERY, and its gradients."""
    call = functools.partial(EVERY[name], "xla" if name in PLAIN else implementation)
    if name in WITHOUT_DERIVATIVE:
        return call(*qkv)

    def loss(*qkv: Any) -> Any:
        found = call(*qkv)
        return sum((x.astype(jnp.float32) ** 2).sum() for x in jax.tree.leaves(found)), found

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*qkv)


def compiled_in_third_call(call: Callable[[], Any]) -> int:
    """How many programs; their names are logged."""
    count = 0

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal count
        count += event == _COMPILED

    jax.block_until_ready((call(), call()))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with jax.log_compiles():
            jax.block_until_ready(call())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return count
