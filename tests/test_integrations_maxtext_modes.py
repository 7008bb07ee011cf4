"""attention=jax_fa3 in MaxText's other modes, against its "dot_product": chunked prefill, decoding, and by the
module that launches another."""

import runpy
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from integrations import assert_runs_kernels, assert_same_as_theirs, inputs
from maxtext_attention import B, H, K, N, T, attention, attention_op, installed

pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings("default"),  # MaxText's own, and its dependencies'
]
FIRST, ROWS = 12, 16  # of the second chunk; what is after it in the cache is empty
written = np.broadcast_to(np.arange(T) < FIRST + ROWS, (B, T)).astype(np.int32)
CHUNK = (B, ROWS, N, H), (B, T, K, H), (B, T, K, H)


@pytest.fixture(autouse=True, scope="module")
def _installed():
    with installed():
        yield


def cached(kernel: str, *caches: Any, **options: Any) -> Any:
    """As a function of query and of the keys and values of a cache for prefill."""

    def call(query: Any, key: Any, value: Any) -> Any:
        values = [(key, value, jnp.asarray(written)), *caches]
        call = attention(kernel, cached_values=values, **options)
        return call(query, key[:, : query.shape[1]], value[:, : query.shape[1]])

    return call


PREFILL = {
    "global": {},
    "window": {"kind": "local_sliding", "sliding_window_size": 7},
    "chunk": {"kind": "chunk", "chunk_attn_window_size": 8},
    "sinks, soft cap": {"sinks": jnp.linspace(-1, 2, N), "attn_logits_soft_cap": 2.0},
}


@pytest.mark.parametrize("name", PREFILL)
def test_chunked_prefill(name):
    previous = jnp.ones((B, FIRST), jnp.int32)
    options = {"mode": "prefill", "previous_chunk": previous, **PREFILL[name]}
    ours, theirs = (cached(x, None, **options) for x in ("jax_fa3", "dot_product"))
    assert_same_as_theirs(ours, theirs, inputs(CHUNK, jnp.float32))
    assert_runs_kernels(ours, inputs(CHUNK, jnp.bfloat16))


def test_chunked_prefill_beside_images_is_refused():
    options = {"mode": "prefill", "previous_chunk": jnp.ones((B, FIRST), jnp.int32)}
    call = cached("jax_fa3", None, bidirectional_mask=np.ones((B, T), bool), **options)
    with pytest.raises(NotImplementedError, match="previous_chunk: got "):
        call(*inputs(CHUNK, jnp.float32))


def test_decoding_is_dot_product():
    """Of one row, over the caches of prefill and of what was decoded since."""
    query, key, value = inputs(((B, 1, N, H), *CHUNK[1:]), jnp.float32)
    since = key[:, :8] + 1, value[:, :8] - 1, jnp.asarray(written[:, :8]), jnp.array([8, 8])
    found, wanted = (
        cached(x, since, mode="autoregressive")(query, key, value)
        for x in ("jax_fa3", "dot_product")
    )
    np.testing.assert_array_equal(found, wanted)


def test_launches_another_module(monkeypatch, tmp_path):
    """`python -m jax_fa3.integrations.maxtext MODULE ARGUMENTS`."""
    (tmp_path / "launched.py").write_text(
        "import sys\nfrom maxtext.layers.attention_op import AttentionOp\n"
        "sys.launched = __name__, sys.argv[1:], AttentionOp.apply_attention\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", "launched", "base.yml", "attention=jax_fa3"])
    monkeypatch.setattr(sys, "launched", None, raising=False)
    monkeypatch.delitem(sys.modules, "jax_fa3.integrations.maxtext")
    original = attention_op.AttentionOp.apply_attention.__wrapped__
    monkeypatch.setattr(attention_op.AttentionOp, "apply_attention", original)
    runpy.run_module("jax_fa3.integrations.maxtext", run_name="__main__", alter_sys=True)
    name, arguments, method = vars(sys)["launched"]
    assert (name, arguments) == ("__main__", ["base.yml", "attention=jax_fa3"])
    assert method.__wrapped__ is original
