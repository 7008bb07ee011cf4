"""For tests on 8 virtual CPU devices, or on GPUs: cases, where their arrays go, and what came of it."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from helpers import Results, assert_rounded, both_oracles
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
DTYPE = jnp.float16
# jax 0.10 gathers what goes in and out of a shard_map inside another, or inside vmap over an explicit
# axis, whatever the function: a sine too.
GATHERS_NESTED = jax.__version_info__ < (0, 11)
_COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def make_mesh(kind: AxisType, platform: str = "cpu", **axes: int) -> Mesh:
    devices = jax.local_devices(backend=platform)[: int(np.prod([*axes.values()]))]
    return Mesh(np.reshape(devices, [*axes.values()]), tuple(axes), axis_types=(kind,) * len(axes))


def small(kv_heads: int, **fields: Any) -> Case:
    """Each batch entry has a length of its own, and documents."""
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 3, (8, 24)), axis=1)
    lengths = rng.integers(12, 25, 8)
    mask = {"query_segment_ids": ids, "key_value_segment_ids": ids, "query_seq_lengths": lengths}
    mask = {k: v.astype(np.int32) for k, v in mask.items()} | {"is_causal": True}
    sizes: Any = {"B": 8, "T": 24, "S": 24, "N": 8, "K": kv_heads, "H": 16, "mask": mask} | fields
    return Case(f"{sizes['N']} and {sizes['K']} heads", **sizes)


MHA, GQA, PAIR, MQA = map(small, (8, 4, 2, 1))


def attend(case: Case, **options: Any) -> Any:
    """A function of query, key, value, the mask's arrays and cotangents to all of the results."""
    static = {k: v for k, v in case.arguments.items() if not isinstance(v, np.ndarray)}

    def function(q: Array, k: Array, v: Array, masks: Any, cotangents: Any) -> Results:
        def call(*qkv: Array) -> Any:
            call = functools.partial(jax_fa3.dot_product_attention, return_residual=True)
            return call(*qkv, **static, **masks, **options)

        results, pullback = jax.vjp(call, q, k, v)
        return Results(*results, *pullback(cotangents))

    return function


def arrays(case: Case) -> Any:
    """The arguments of attend(case)."""
    masks = {k: jnp.asarray(v) for k, v in case.mask.items() if isinstance(v, np.ndarray)}
    return *case.inputs(DTYPE), masks, case.cotangents(DTYPE)


def specs(batch: Any, heads: Any, kv_heads: Any, masks: Any) -> Any:
    """Where the arguments of attend go."""
    query, key, lse = P(batch, None, heads), P(batch, None, kv_heads), P(batch, None, heads)
    return query, key, key, {name: P(batch) for name in masks}, (query, lse)


def put(mesh: Mesh, operands: Any, where: Any) -> Any:
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), operands, where
    )


def run(function: Any, *operands: Any) -> tuple[Any, set[str]]:
    """The results and the program's collectives."""
    compiled = jax.jit(function).lower(*operands).compile()
    return compiled(*operands), collectives(compiled)


def collectives(compiled: Any) -> set[str]:
    return set(_COLLECTIVE.findall(compiled.as_text()))


@functools.cache
def _oracles(case: Case, sharers: int) -> tuple[Results, Results]:
    q, k, v, _, cotangents = arrays(case)
    copies = dataclasses.replace(case, K=case.K * sharers)
    inputs = q, jnp.repeat(k, sharers, axis=2), jnp.repeat(v, sharers, axis=2)
    both = jax.jit(both_oracles, static_argnums=(0, 1))
    exact, rounded = both(copies, DTYPE, inputs, cotangents)

    def total(x: Array) -> Array:
        return x.reshape(*x.shape[:2], case.K, sharers, x.shape[3]).sum(3)

    if sharers > 1:
        dk, dv = (x.astype(DTYPE).astype(x.dtype) for x in (rounded.dk, rounded.dv))
        rounded = rounded._replace(dk=total(dk), dv=total(dv))
        exact = exact._replace(dk=total(exact.dk), dv=total(exact.dv))
    return exact, rounded


def assert_right(found: Results, case: Case, sharers: int = 1) -> None:
    """By the tolerance rule; what is None is not looked at.

    sharers: the devices that have one key/value head together. Each rounds its part of dk and dv,
    so the rounded oracle does as well.
    """
    exact, rounded = _oracles(case, sharers)
    assert_rounded(found, exact, rounded, case, jnp.finfo(DTYPE).eps)
