"""jax_fa3 in AXLearn's list of kernels, against its ReferenceMHA; AXLearn itself where it is installed,
else a stand-in for its interface."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_ins
from integrations import assert_no_further, assert_runs_kernels, assert_same_as_theirs, inputs
from lowering import lower, targets

from jax_fa3 import _ffi

pytestmark = pytest.mark.usefixtures("on_cpu")
B, T, N, K, H = 2, 24, 4, 2, 16
SHAPES = (B, T, N, H), (B, T, K, H), (B, T, K, H)
ids = np.repeat([[0, 1, 2], [4, 4, 7]], 8, axis=1)


@pytest.fixture(autouse=True, scope="module")
def installed():
    """And as it was afterwards."""
    with stand_ins.axlearn():
        adapter: Any = importlib.import_module("jax_fa3.integrations.axlearn")
        utils: Any = importlib.import_module("axlearn.common.flash_attention.utils")
        original = list(utils.BACKENDS["gpu"])
        adapter.install()
        adapter.install(device="sm_90")  # in place of the first
        assert len(utils.BACKENDS["gpu"]) == len(original) + 1
        yield
        utils.BACKENDS["gpu"][:] = original


def first() -> Any:
    utils: Any = importlib.import_module("axlearn.common.flash_attention.utils")
    return utils.BACKENDS["gpu"][0]


def reference() -> Any:
    common: Any = importlib.import_module("axlearn.common.flash_attention.common")
    return common.ReferenceMHA


def bias(*names: str) -> Any:
    lib: Any = importlib.import_module("axlearn.common.attention_bias")
    first, rows = jnp.array([3, 5]), jnp.asarray(np.arange(2 * T).reshape(B, T) % 29)
    window = {"shape": (T, T), "sliding_window_size": 5}
    made = {
        "causal": lambda: lib.CausalAttentionBias(shape=(T, T)),
        "causal from a row": lambda: lib.CausalAttentionBias(shape=(T, T), target_positions=first),
        "causal by rows": lambda: lib.CausalAttentionBias(shape=(T, T), target_positions=rows),
        "sliding": lambda: lib.SlidingWindowAttentionBias(**window),
        "sliding from a row": lambda: lib.SlidingWindowAttentionBias(
            **window, target_positions=first
        ),
        "segments": lambda: lib.SegmentIdAttentionBias(segment_ids=jnp.asarray(ids)),
        "a function": lambda: lib.MaskFnAttentionBias(
            mask=lambda row, key: (key <= row) & ((row - key) % 3 == 0), shape=(T, T)
        ),
        "an array": lambda: lib.TensorAttentionBias(
            jax.random.normal(jax.random.key(9), (1, N, T, T))
        ),
    }
    return lib.CompositeAttentionBias([made[name]() for name in names])


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
    ("sliding",),
    ("causal", "sliding"),
    ("sliding from a row",),
    ("causal by rows", "sliding"),
    ("causal", "segments"),
    ("a function",),
    ("causal", "an array"),
)


@pytest.mark.parametrize("names", CASES, ids=", ".join)
def test_same_as_the_reference(names):
    ours, theirs = (attention(x, names) for x in (first(), reference()))
    rows = (jnp.arange(T) < 20)[:, None, None]  # those of some masks see nothing after
    if "causal by rows" in names and "sliding" in names:
        rows = (
            rows
            & (jnp.abs(jnp.arange(2 * T).reshape(B, T) % 29 - jnp.arange(T)) < 5)[..., None, None]
        )
    found = inputs(SHAPES, jnp.float32)
    assert_same_as_theirs(
        lambda *x: jnp.where(rows, ours(*x), 0), lambda *x: jnp.where(rows, theirs(*x), 0), found
    )


def test_sinks():
    arrays = *inputs(SHAPES, jnp.float32), jnp.array([0.0, -1.0, 2.0, 0.5])
    ours, theirs = (attention(x, ("causal",)) for x in (first(), reference()))
    assert_same_as_theirs(ours, theirs, arrays)


def test_bf16():
    ours, theirs = (attention(x, ("causal",)) for x in (first(), reference()))
    assert_no_further(ours, theirs, inputs(SHAPES, jnp.bfloat16))


@pytest.mark.parametrize("names", CASES[:9] + CASES[10:], ids=", ".join)
def test_reaches_the_kernels(names):
    assert_runs_kernels(attention(first(), names), inputs(SHAPES, jnp.bfloat16))


def test_a_policy_that_saves_the_residuals_runs_the_forward_once():
    call = attention(first(), ("causal",))

    def forwards(name: str) -> int:
        policy = jax.checkpoint_policies.save_only_these_names(name)
        function = jax.checkpoint(lambda *x: jnp.sin(call(*x)).sum(), policy=policy)
        found = lower(jax.value_and_grad(function), *inputs(SHAPES, jnp.bfloat16))
        return targets(found).count(_ffi.FWD)

    assert (forwards("flash_residuals"), forwards("o_proj")) == (1, 2)


def test_says_what_it_does_not_take():
    base: Any = importlib.import_module("axlearn.common.flash_attention.common").BaseFlashAttention

    def reason(dtype: Any = jnp.bfloat16, cache: Any = None, **cfg: Any) -> str | None:
        op = first().default_config().set(**cfg).instantiate()
        said: list[str] = []
        op._log_unsupported = lambda reason: said.append(reason) or False
        query, key, value = inputs(SHAPES, dtype)
        batch = {"query": query, "key": key, "value": value, "bias": bias("causal", "segments")}
        supported = op.is_supported(input_batch=batch, kv_cache_type=cache)
        assert isinstance(op, base) and supported == (not said)
        return said[0] if said else None

    assert reason() is None
    assert "query: got dtype float32, wanted bfloat16" in str(reason(jnp.float32))
    assert reason(dropout_rate=0.1) == "it has no dropout."
    assert reason(cache=dict) == "it does not decode."
