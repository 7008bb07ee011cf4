"""What context parallelism refuses, in whose name and with which sizes."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import hide_gpus

from jax_fa3 import context_parallel

# data, sp and model, 2 devices each; the CPU's, for this is run where there are few GPUs, too.
CPUS = np.reshape(jax.local_devices(backend="cpu")[:8], (2, 2, 2))
MESH = Mesh(CPUS, ("data", "sp", "model"))


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    hide_gpus(monkeypatch)


def structs(*shapes: tuple[int, ...]) -> list[Any]:
    return [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]


def whole(spec: Any, *shapes: Any, **options: Any) -> None:
    sharding = NamedSharding(MESH, spec) if isinstance(spec, P) else spec
    options = {"axis_name": "sp", "sharding": sharding} | options
    jax.eval_shape(
        lambda *x: context_parallel.dot_product_attention(*x, **options), *structs(*shapes)
    )


def inside(spec: Any, *shapes: Any, check_vma: bool = True, **options: Any) -> None:
    options = {"axis_name": "sp"} | options
    call = jax.shard_map(
        lambda *x: context_parallel.dot_product_attention(*x, **options),
        mesh=MESH,
        in_specs=spec,
        out_specs=P("data", "sp"),
        check_vma=check_vma,
    )
    jax.eval_shape(call, *structs(*shapes))


Q, KV = (2, 8, 4, 16), (2, 8, 2, 16)
SPLIT = P("data", "sp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"axis_name": "cp"},
            "axis_name: got 'cp', wanted an axis of sharding's mesh {'data': 2, ",
        ),
        ({"axis_name": ("sp",)}, r"axis_name: got \('sp',\), wanted the name of one mesh axis"),
        ({"axis_name": None}, "axis_name: got None"),
        ({"strategy": "star"}, "strategy: got 'star', wanted 'ring', 'all_gather' or 'all_to_all'"),
        ({"zigzag": 1}, "zigzag: got 1, wanted True or False"),
        ({"sharding": "sp"}, "sharding: got 'sp', wanted a NamedSharding"),
        ({"key_value_segment_ids": np.zeros((2, 8))}, "key_value_segment_ids: got values of dtype"),
        ({"scale": "x"}, "scale: got 'x'"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        whole(SPLIT, Q, KV, KV, **options)


@pytest.mark.parametrize("name", ["bias", "mask", "scale"])
def test_not_implemented(name):
    value = jnp.float32(2) if name == "scale" else jnp.ones((8, 8), bool)
    wanted = (
        "a static float: multiply query" if name == "scale" else "None: context parallelism has"
    )
    with pytest.raises(NotImplementedError, match=f"{name}: got an? .*array, wanted {wanted}"):
        jax.eval_shape(lambda x: whole(SPLIT, Q, KV, KV, **{name: x}), value)
    with pytest.raises(NotImplementedError, match="implementation='fa3': query: got dtype float32"):
        whole(SPLIT, Q, KV, KV, implementation="fa3")


@pytest.mark.parametrize(
    ("spec", "query", "key", "options", "message"),
    [
        (P("data"), Q, KV, {}, "sharding: got .*data.*, wanted 'sp' in T of query [B, T, N, H]"),
        (P("sp", "data"), Q, KV, {}, "sharding: got "),
        (P("data", ("sp", "model")), Q, KV, {}, "sharding: got "),
        (
            P("data", "sp", None, "model"),
            Q,
            KV,
            {},
            "wanted 'sp' in T of query [B, T, N, H] and no",
        ),
        (P("data", "sp"), Q[1:], KV[1:], {}, "wanted 'sp' in T of query [T, N, H] and nothing"),
        (
            SPLIT,
            (2, 9, 4, 16),
            KV,
            {},
            "query: got length 9, wanted a positive multiple of 2 for the 2 dev",
        ),
        (
            SPLIT,
            Q,
            (2, 9, 4, 16),
            {},
            "key: got length 9, wanted a positive multiple of 2 for the 2 devices ",
        ),
        (
            SPLIT,
            Q,
            (2, 6, 4, 16),
            {"zigzag": True},
            "of 4 for the 2 devices of axis 'sp' in zigzag",
        ),
        (
            SPLIT,
            (3, 8, 4, 16),
            (3, 8, 2, 16),
            {},
            "query: batch: got 3, wanted a multiple of 2, the",
        ),
        (
            P(None, "sp", "model"),
            (2, 8, 3, 16),
            (2, 8, 3, 16),
            {},
            "query: heads: got 3, wanted a mu",
        ),
        (
            P(None, "sp", ("model", "data")),
            Q,
            KV,
            {},
            "key: heads: got 2, wanted a multiple of 4, the",
        ),
        (
            SPLIT,
            (2, 2**32, 4, 16),
            KV,
            {},
            "query: got length 4294967296, wanted less than 2**31 pos",
        ),
        (SPLIT, (2, 0, 4, 16), KV, {}, "query: got length 0, wanted a positive multiple of 2 for"),
    ],
)
def test_sharding(spec, query, key, options, message):
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ValueError, match=pattern.replace("[B, T", r"\[B, T")):
        whole(spec, query, key, key, **options)


@pytest.mark.parametrize(
    ("spec", "query", "options", "message"),
    [
        (
            SPLIT,
            Q,
            {"axis_name": "cp"},
            r"'cp', wanted an axis that is manual here .*'data'.*; or sh",
        ),
        (
            SPLIT,
            (2, 10, 4, 16),
            {"zigzag": True},
            "query: got length 5, wanted a positive multiple of 2 for",
        ),
        (
            (SPLIT, P("data"), P("data")),
            Q,
            {},
            "key: got an array that is the same on the 2 devices of ",
        ),
        (
            (P("data"), SPLIT, SPLIT),
            Q,
            {},
            "query: got an .* each device's own part, as key is",
        ),
        (
            SPLIT,
            (2, 8, 3, 16),
            {"strategy": "all_to_all"},
            "'all_to_all' with 3 query and 3 key/val",
        ),
    ],
)
def test_inside_shard_map(spec, query, options, message):
    key = (*query[:2], 3 if query[2] == 3 else 2, 16)
    with pytest.raises(ValueError, match=message):
        inside(spec, query, key, key, **options)


def test_outside_shard_map():
    with pytest.raises(ValueError, match="axis_name: got 'sp', wanted an axis that is manual here"):
        whole(None, Q, KV, KV)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
def test_other_derivatives(strategy):
    def call(query):
        return context_parallel.dot_product_attention(
            query,
            query,
            query,
            axis_name="sp",
            strategy=strategy,
            sharding=NamedSharding(MESH, SPLIT),
        ).sum()

    query = jnp.ones(Q)
    for transform in (lambda: jax.jvp(call, (query,), (query,)), lambda: jax.hessian(call)(query)):
        with pytest.raises(NotImplementedError, match="jax_fa3.context_parallel have first deriv"):
            transform()
