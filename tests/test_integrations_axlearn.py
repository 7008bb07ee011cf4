"""jax_fa3 in AXLearn's list of kernels, against its ReferenceMHA; AXLearn itself where it is installed,
else a stand-in for its interface."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from axlearn_stand_in import axlearn
from integrations import assert_no_further, assert_runs_kernels, assert_same_as_theirs, inputs
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from lowering import lower, targets

from jax_fa3 import _ffi

pytestmark = pytest.mark.usefixtures("on_cpu")
B, T, N, K, H = 2, 24, 4, 2, 16
SHAPES = (B, T, N, H), (B, T, K, H), (B, T, K, H)
ids = np.repeat([[0, 1, 2], [4, 4, 7]], 8, axis=1)


@pytest.fixture(autouse=True, scope="module")
def installed():
    """And as it was afterwards."""
    with axlearn():
        adapter: Any = importlib.import_module("jax_fa3.integrations.axlearn")
        backends: Any = module("flash_attention.utils").BACKENDS["gpu"]
        original = list(backends)
        adapter.install()
        adapter.install(device="sm_90")  # in place of the first
        assert len(backends) == len(original) + 1
        yield
        backends[:] = original


def module(name: str) -> Any:
    return importlib.import_module(f"axlearn.common.{name}")


def first() -> Any:
    return module("flash_attention.utils").BACKENDS["gpu"][0]


def reference() -> Any:
    return module("flash_attention.common").ReferenceMHA


def bias(*names: str, dtype: Any = None) -> Any:
    """What MultiheadAttention adds up: its masks have the positions of rows and keys."""
    lib: Any = module("attention_bias")
    positions = {
        "": (jnp.arange(T)[None], jnp.arange(T)[None]),
        " from a row": (jnp.array([[3], [5]]) + jnp.arange(T), jnp.arange(T)[None]),
        " by rows": (jnp.asarray(np.arange(2 * T).reshape(B, T) % 29), jnp.arange(T)[None]),
        " by rows and keys": (
            jnp.arange(T)[None] // 2,
            jnp.array([[0, 0, 1, 5, 5, *range(5, T)], [-1, -1, *range(T - 2)]]),
        ),
        " of no order": (jnp.arange(T)[None], jnp.arange(T)[None, ::-1]),
    }

    def where(suffix: str) -> dict[str, Any]:
        rows, keys = positions[suffix]
        return {"target_positions": rows, "source_positions": keys, "dtype": dtype}

    def made(name: str) -> Any:
        if name.startswith("causal"):
            return lib.CausalAttentionBias(**where(name.removeprefix("causal")))
        if name.startswith("sliding"):
            size = 9 if name == "sliding by nine" else 5
            mask = lib.sliding_window_causal_mask(sliding_window_size=size)
            suffix = name.removeprefix("sliding").removesuffix(" by nine")
            options = where(suffix) | {"sliding_window_size": size}
            return lib.SlidingWindowAttentionBias(mask, **options)
        if name == "segments":
            return lib.SegmentIdAttentionBias(segment_ids=jnp.asarray(ids))
        if name == "a function":
            return lib.MaskFnAttentionBias(
                lambda row, key: (key <= row) & ((row - key) % 3 == 0), **where("")
            )
        return lib.TensorAttentionBias(jax.random.normal(jax.random.key(9), (1, N, T, T)))

    total = lib.ZeroAttentionBias()
    for name in names:
        total += made(name)
    return total.astype(dtype)


def attention(kind: Any, names: tuple[str, ...], **options: Any) -> Any:
    op = kind.default_config().set(softmax_scale=0.3).instantiate()

    def call(query: Any, key: Any, value: Any, *sinks: Any) -> Any:
        batch = {"query": query, "key": key, "value": value, "bias": bias(*names)} | options
        return op(batch | ({"logit_sink": sinks[0]} if sinks else {}))

    return call


CASES = (
    (),
    ("causal",),
    ("causal from a row",),
    ("causal by rows",),
    ("causal by rows and keys",),
    ("sliding",),
    ("causal", "sliding"),
    ("causal", "causal"),
    ("sliding from a row",),
    ("sliding by rows and keys",),
    ("causal", "segments"),
    ("sliding", "segments"),
    ("a function",),
    ("sliding", "sliding by nine"),
    ("causal", "a function", "segments"),
    ("causal", "an array"),
)


def both(names: tuple[str, ...]) -> tuple[Any, Any]:
    """Ours and theirs, in the rows that see a key."""
    found = bias(*names).value()
    rows = 1 if found is None else (found > -1e14).any(-1).all(1)[..., None, None]  # [B, T, 1, 1]
    assert np.all(rows) or names[0].startswith("sliding ")

    def seeing(kind: Any) -> Any:
        call = attention(kind, names)
        return lambda *x: jnp.where(rows, call(*x), 0)

    return seeing(first()), seeing(reference())


@pytest.mark.parametrize("names", CASES, ids=", ".join)
def test_same_as_the_reference(names):
    assert_same_as_theirs(*both(names), inputs(SHAPES, jnp.float32))


def test_sinks():
    arrays = *inputs(SHAPES, jnp.float32), jnp.array([0.0, -1.0, 2.0, 0.5])
    ours, theirs = (attention(x, ("causal",)) for x in (first(), reference()))
    assert_same_as_theirs(ours, theirs, arrays)


@pytest.mark.parametrize("names", CASES, ids=", ".join)
def test_bf16(names):
    ours, theirs = both(names)
    assert_no_further(ours, theirs, inputs(SHAPES, jnp.bfloat16))


@pytest.mark.parametrize("names", CASES, ids=", ".join)
def test_reaches_the_kernels(names):
    assert_runs_kernels(attention(first(), names), inputs(SHAPES, jnp.bfloat16))


def test_keys_whose_positions_decrease_give_nan():
    out = attention(first(), ("causal of no order",))(*inputs(SHAPES, jnp.float32))
    assert np.isnan(out).all()


def layer(backend: str, names: tuple[str, ...], shape: tuple[int, int] = (2, 2)) -> Any:
    """As FlashAttention._compute_attention (flash_attention/layer.py at f4f5bd1): chooses a kernel, and calls
    it under shard_map."""
    devices = np.reshape(jax.devices("cpu")[: np.prod(shape)], shape)
    specs = {x: P("data", None, "model", None) for x in ("btnh", "bsnh")}
    specs["bnts"] = P("data", "model", None, None)

    def call(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        batch = {"query": query, "key": key, "value": value, "logit_sink": sinks}
        batch["bias"] = bias(*names, dtype=query.dtype)
        kernel = module("flash_attention.utils").flash_attention_implementation(
            backend, softmax_scale=1.0, dropout_rate=None, **batch
        )
        in_specs = {"query": specs["btnh"], "key": specs["bsnh"], "value": specs["bsnh"]}
        in_specs |= {"logit_sink": P("model"), "prng_key": P(None), "page_tables": P(None)}
        in_specs["bias"] = batch["bias"].partition_spec(specs)
        batch |= {"prng_key": None, "page_tables": None}
        return jax.shard_map(
            kernel,
            mesh=Mesh(devices, ("data", "model")),
            in_specs=(in_specs,),
            out_specs=specs["btnh"],
            check_vma=False,
        )(batch)

    return call


@pytest.mark.parametrize(
    "names", [("causal",), ("causal from a row", "segments"), ("causal", "an array")], ids=", ".join
)
def test_chosen_by_the_layer_on_a_mesh(names):
    arrays = *inputs(SHAPES, jnp.bfloat16), jnp.zeros(N, jnp.bfloat16)
    ours, theirs = (layer(x, names) for x in ("gpu", "cpu"))
    assert_runs_kernels(ours, arrays)
    assert_no_further(ours, theirs, arrays, pooled=True)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_policy_that_saves_the_residuals_runs_the_forward_once(sharded):
    arrays = inputs(SHAPES, jnp.bfloat16)
    call = attention(first(), ("causal",))
    if sharded:
        arrays, call = (*arrays, jnp.zeros(N, jnp.bfloat16)), layer("gpu", ("causal",))

    def forwards(name: str) -> int:
        policy = jax.checkpoint_policies.save_only_these_names(name)
        function = jax.checkpoint(lambda *x: jnp.sin(call(*x)).sum(), policy=policy)
        found = lower(jax.value_and_grad(function), *arrays)
        return targets(found).count(_ffi.FWD)

    assert (forwards("flash_residuals"), forwards("o_proj")) == (1, 2)


def test_says_what_it_does_not_take():
    base: Any = module("flash_attention.common").BaseFlashAttention

    def reason(dtype: Any = jnp.bfloat16, cache: Any = None, pages: Any = None, **cfg: Any) -> Any:
        op = first().default_config().set(**cfg).instantiate()
        said: list[str] = []
        op._log_unsupported = lambda reason: said.append(reason) or False
        query, key, value = inputs(SHAPES, dtype)
        batch = {"query": query, "key": key, "value": value, "bias": bias("causal", "segments")}
        batch["page_tables"] = pages
        supported = op.is_supported(input_batch=batch, kv_cache_type=cache)
        assert isinstance(op, base) and supported == (not said)
        return said[0] if said else None

    assert reason() is None
    assert "query: got dtype float32, wanted bfloat16" in reason(jnp.float32)
    assert reason(dropout_rate=0.1) == "it does not draw AXLearn's dropout."
    assert reason(cache=dict) == "it does not decode."
    assert reason(pages=jnp.zeros((B, 2), int)) == "it does not decode."
