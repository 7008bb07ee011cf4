"""attention=jax_fa3 in MaxText's AttentionOp, against its "dot_product"."""

import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integrations import assert_no_further, assert_runs_kernels, assert_same_as_theirs, inputs
from lowering import lower, targets
from maxtext_attention import (
    CASES,
    SHAPES,
    B,
    N,
    T,
    attention,
    attention_op,
    installed,
    on_real_rows,
)

from jax_fa3 import _ffi

pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings("default"),  # MaxText's own, and its dependencies'
]


@pytest.fixture(autouse=True, scope="module")
def _installed():
    with installed():
        yield


@pytest.mark.parametrize("name", CASES)
def test_same_as_dot_product(name):
    ours, theirs = attention("jax_fa3", **CASES[name]), attention("dot_product", **CASES[name])
    assert_same_as_theirs(on_real_rows(ours), on_real_rows(theirs), inputs(SHAPES, jnp.float32))


def test_mla():
    """Head dims of DeepSeek: 192 for query and key, 128 for value."""
    shapes = (B, T, N, 192), (B, T, N, 192), (B, T, N, 128)
    found = [0.1 * x for x in inputs(shapes, jnp.float32)]
    ours, theirs = (attention(x, "mla", num_kv_heads=N) for x in ("jax_fa3", "dot_product"))
    assert_same_as_theirs(ours, theirs, found)


@pytest.mark.parametrize("name", CASES)
def test_bf16(name):
    ours, theirs = attention("jax_fa3", **CASES[name]), attention("dot_product", **CASES[name])
    assert_no_further(on_real_rows(ours), on_real_rows(theirs), inputs(SHAPES, jnp.bfloat16))


@pytest.mark.parametrize("name", CASES)
def test_reaches_the_kernels(name):
    """And no kernel runs twice under MaxText's remat policies that save "context"."""
    function, arrays = attention("jax_fa3", **CASES[name]), inputs(SHAPES, jnp.bfloat16)
    assert_runs_kernels(function, arrays)
    policy = jax.checkpoint_policies.save_only_these_names("context")
    assert_runs_kernels(jax.checkpoint(function, policy=policy), arrays)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(
    "name, strategy",
    [
        ("global", "ring"),
        ("sinks", "ring"),
        ("sinks", "all_gather"),
        ("soft cap, window, segments", "ring"),
        ("soft cap, window, segments", "all_gather"),
        ("chunk, segments", "all_gather"),
    ],
)
def test_context_parallelism(name, strategy, balanced):
    """Two ways, with four more for batch and heads; load-balanced is MaxText's own order."""
    utils = importlib.import_module("maxtext.utils.max_utils")
    options = dict(CASES[name])
    split = (
        "ici_context_parallelism=2",
        "ici_data_parallelism=2",
        "ici_tensor_parallelism=2",
        f"context_parallel_load_balance={balanced}",
        f"context_parallel_strategy={strategy}",
        "context_parallel_reorder_strategy=dual_chunk_swap",
        "hardware=gpu",  # elsewhere MaxText's configuration has no ring
    )

    def reordered(x: Any, back: bool = False) -> Any:
        return utils.reorder_sequence(jnp.asarray(x), 2, 1, back) if balanced else jnp.asarray(x)

    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    within = {"positions": reordered(positions)}
    if "segment_ids" in options:
        within["segment_ids"] = reordered(options["segment_ids"])
    parts = attention("jax_fa3", arguments=split, **options | within)
    whole = attention("dot_product", **options)

    def ours(*arrays: Any) -> Any:
        return reordered(parts(*map(reordered, arrays)), back=True)

    assert_same_as_theirs(on_real_rows(ours), on_real_rows(whole), inputs(SHAPES, jnp.float32))


REFUSED = {
    "record_max_logits: got True": {"record_max_logits": True},
    "dropout_rate: got 0.1": {"dropout_rate": 0.1},
    "indexer_mask: got ": {"indexer_mask": jnp.zeros((B, T, T))},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message):
    with pytest.raises(NotImplementedError, match=message):
        attention("jax_fa3", **REFUSED[message])(*inputs(SHAPES, jnp.float32))


def test_a_striped_order_is_refused():
    """Which "auto" means on a GPU, where documents are packed into a ring."""
    adapter: Any = importlib.import_module("jax_fa3.integrations.maxtext")
    names = "context_parallel_reorder_strategy", "packing", "context_parallel_strategy", "hardware"
    for values in (("striped", False, "all_gather", "cpu"), ("auto", True, "ring", "gpu")):
        settings = SimpleNamespace(**dict(zip(names, values, strict=True)))
        settings.context_parallel_reorder_strategy = SimpleNamespace(value=values[0])
        with pytest.raises(NotImplementedError, match="got striped, wanted dual_chunk_swap"):
            adapter._check_context_parallel(SimpleNamespace(config=settings), True, None, None)


def test_other_kernels_are_left_alone(monkeypatch):
    found, wrapper = inputs(SHAPES, jnp.float32), attention_op.AttentionOp.apply_attention
    wrapped = attention("dot_product")(*found)
    monkeypatch.setattr(attention_op.AttentionOp, "apply_attention", wrapper.__wrapped__)
    np.testing.assert_array_equal(wrapped, attention("dot_product")(*found))


POLICIES = {
    "minimal_with_context": 1,
    "save_dot_with_context_except_mlp": 1,
    "minimal": 2,
    "save_dot_except_mlp": 2,
    "full": 2,
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_that_save_the_context_run_the_forward_once(name):
    """MaxText's own policies, by their names."""
    decoder: Any = importlib.import_module("maxtext.layers.nnx_decoders").NNXDecoder
    settings = SimpleNamespace(remat_policy=name, scan_layers=False)
    layer = SimpleNamespace(config=settings)
    layer.minimal_policy = partial(decoder.minimal_policy, layer)
    policy = decoder.get_remat_policy(layer)
    call = attention("jax_fa3")
    function = jax.checkpoint(lambda *x: jnp.sin(call(*x)).sum(), policy=policy)
    found = targets(lower(jax.value_and_grad(function), *inputs(SHAPES, jnp.bfloat16)))
    assert found.count(_ffi.FWD) == POLICIES[name]
    assert found.count(_ffi.BWD) == 1
