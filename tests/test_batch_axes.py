"""Several batch axes: as one call of all their entries, whatever is broadcast or mapped. Over devices:
test_batch_axes_sharding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_axes import BATCH, COTANGENTS, QKV, RNG, A, B, H, K, N, S, T, V, grads, normal
from helpers import assert_close
from jax import Array
from lowering import lower, operations, targets
from test_ffi import needs_kernels

import jax_fa3
from jax_fa3 import _targets, context_parallel, fp8

IDS = RNG.integers(0, 2, (*BATCH, 1)).repeat(S, -1)


def integers(high: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, high + 1, shape)


def entry_by_entry(cotangents: Any, *arrays: Array, names: Any = (), **options: Any) -> Any:
    """The same, of each entry by itself; an array whose leading sizes are not those of the batch is for
    all of them."""
    wanted: Any = None
    sums: Any = None
    for place in np.ndindex(*BATCH):

        def own(x: Any, place: Any = place) -> Any:
            if np.shape(x)[:2] == BATCH:
                return x[place]
            if np.ndim(x) == 5:  # broadcast over some of the axes
                return x[tuple(i if n > 1 else 0 for i, n in zip(place, x.shape, strict=False))]
            return x

        def call(*arrays: Array, own: Any = own) -> Any:
            given: Any = {k: own(x) for k, x in options.items()}
            given |= {k: own(x) for k, x in zip(names, arrays[3:], strict=True)}
            return jax_fa3.dot_product_attention(
                *(own(x) for x in arrays[:3]), **given, return_residual=True
            )

        found, pullback = jax.vjp(call, *arrays)
        of_all = pullback(tuple(own(x) for x in cotangents))
        sums = of_all if sums is None else jax.tree.map(jnp.add, sums, of_all)
        whole = [jnp.zeros((*BATCH, *x.shape)).at[place].set(x) for x in found]
        wanted = whole if wanted is None else jax.tree.map(jnp.add, wanted, whole)
    return tuple(wanted), sums


FORMS = [(A, B), (1, 1), (A, 1), (1, B)]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {
        "query_seq_lengths": integers(T, *BATCH),
        "key_value_seq_lengths": integers(S, *BATCH),
    },
    "ids": {"query_segment_ids": IDS[..., :T], "key_value_segment_ids": IDS, "is_causal": True},
    "padding": {
        "query_segment_ids": IDS[..., :T], "key_value_segment_ids": IDS, "padding_segment_id": 0,
    },
    "intervals": {"key_begin": integers(3, *BATCH, T), "key_end": 4 + integers(3, *BATCH, T)},
    "several": {
        "key_begin": np.broadcast_to([0, 4], (*BATCH, T, 2)),
        "key_end": integers(1, *BATCH, T, 2) + np.array([1, 5]),
    },
    "offset": {"query_offset": jnp.int32(2), "is_causal": True},
    "offsets": {"query_offset": integers(4, *BATCH), "is_causal": True},
    "bounds": {"query_offset": integers(4, *BATCH), "local_window_size": 2},
    "huge": {"query_offset": np.array([[2**70, -(2**70), 0]] * A), "is_causal": True},
    "scale": {"scale": 0.3, "logits_soft_cap": 2.0},
    **{f"mask {f}": {"mask": RNG.random((*f, 1, T, S)) < 0.6} for f in FORMS},
    "mask of keys": {"mask": RNG.random((*BATCH, 1, 1, S)) < 0.6},
    "mask of all": {"mask": RNG.random((T, S)) < 0.6},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_arguments(name: str):
    found = grads(COTANGENTS, *QKV, **CASES[name])
    assert_close(found, entry_by_entry(COTANGENTS, *QKV, **CASES[name]), 1e-5)


LEARNED: dict[str, Array] = {
    **{f"bias {f}": normal(*f, N, T, S) for f in FORMS},
    "bias of rows": normal(A, B, 1, 1, S),
    "bias of heads": normal(N, T, S),
    "sinks": normal(N),
    "alibi_slopes": normal(N),
    "relative_bias": normal(N, 5),
}


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_are_summed_over_what_is_broadcast(name: str):
    arrays, names = (*QKV, LEARNED[name]), [name.split()[0]]
    found = grads(COTANGENTS, *arrays, names=names, is_causal=True)
    wanted = entry_by_entry(COTANGENTS, *arrays, names=names, is_causal=True)
    assert_close(found, wanted, 1e-5)


@pytest.mark.parametrize("kind", ["fused", "three"])
def test_packed(kind: str):
    q, k, _ = QKV
    k = jnp.concatenate((k, k), -3)[..., :T, :, :]
    parts = (q, k, 2 * k) if kind == "fused" else (q, q + 1, 2 * q)
    qkv = jnp.concatenate(parts, -2) if kind == "fused" else jnp.stack(parts, -3)
    heads = K if kind == "fused" else None
    call = functools.partial(jax_fa3.qkv_dot_product_attention, qkv, heads, is_causal=True)
    wanted = jax_fa3.dot_product_attention(*parts, is_causal=True)
    assert_close(call(), wanted, 1e-6)


def test_three_axes_and_axes_of_one():
    q, k, v = (x[:, None] for x in QKV)
    wanted = jax_fa3.dot_product_attention(*QKV, is_causal=True)
    assert_close(jax_fa3.dot_product_attention(q, k, v, is_causal=True)[:, 0], wanted, 1e-6)


@pytest.mark.parametrize("sizes", [(0, B), (A, 0)])
def test_no_entries(sizes: tuple[int, int]):
    q, k, v = (x[: sizes[0], : sizes[1]] for x in QKV)
    bias = jnp.ones((1, sizes[1], N, T, S))
    assert jax_fa3.dot_product_attention(q, k, v, bias).shape == (*sizes, T, N, V)


@pytest.mark.parametrize("mapped", [0, 3])
def test_under_vmap(mapped: int):
    bias = normal(1, B, N, T, S)
    arrays = [*QKV, bias]
    axes: list[int | None] = [None] * 4
    axes[mapped] = 0
    stacked = arrays.copy()
    stacked[mapped] = jnp.stack((arrays[mapped], 2 * arrays[mapped]))
    call = functools.partial(grads, COTANGENTS, names=["bias"])
    found = jax.jit(jax.vmap(call, axes))(*stacked)
    for i in range(2):
        one = [x[i] if j == mapped else x for j, x in enumerate(stacked)]
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), call(*one), 1e-5)


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"key": jnp.ones((A, 2, S, K, H))},
        r"key: got shape \(2, 2, 7, 2, 8\), wanted the batch axes",
    ),
    ({"value": jnp.ones((A, S, K, V))}, "value: got shape"),
    ({"key": jnp.ones((A, B, S, K, 4))}, "key: got shape"),
    ({"query_seq_lengths": [1, 2]}, r"query_seq_lengths: got shape \(2,\), wanted the batch axes"),
    ({"query_seq_lengths": np.full(BATCH, 2.5)}, "query_seq_lengths: got values of dtype float64"),
    ({"query_segment_ids": np.ones((*BATCH, T), bool), "key_value_segment_ids": IDS}, "query_seg"),
    ({"key_begin": np.zeros((6, T), int)}, "key_begin: got shape"),
    ({"query_offset": [1, 2, 3]}, "query_offset: got shape"),
    ({"mask": jnp.ones((2, 2, 1, T, S), bool)}, "mask: got shape"),
    ({"bias": jnp.ones((1, 1, 1, 1, T, S))}, "bias: got shape"),
    ({"bias": jnp.ones((1, 1, 3, T, S))}, "bias: got shape"),
    ({"mask": jnp.ones((T, S))}, "mask: got dtype float32, wanted bool"),
    ({"sharding": 3}, "sharding: got 3"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str):
    given: Any = dict(zip(("query", "key", "value"), QKV, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        jax_fa3.dot_product_attention(**given)
    if "sharding" not in change:
        assert (jax_fa3.is_supported(**given, device="sm_90") or "").startswith(message[:3])


@pytest.mark.parametrize("who", [context_parallel, fp8])
def test_of_others_are_refused_by_name(who: Any):
    more: Any = {"axis_name": "x"} if who is context_parallel else {}
    with pytest.raises(ValueError, match="query: got shape"):
        who.dot_product_attention(*QKV, **more)


@pytest.mark.parametrize("scale", [0.5, np.float32(0.5), jnp.float32(0.5)], ids=repr)
def test_a_known_scale_is_static(scale: Any):
    q = jax.ShapeDtypeStruct((*BATCH, T, N, 64), jnp.bfloat16)
    options: Any = {"scale": scale, "implementation": "fa3"}
    text = lower(lambda q: jax_fa3.dot_product_attention(q, q, q, **options), q)
    assert targets(text) == [_targets.FWD]


@needs_kernels
@pytest.mark.parametrize("lead", [(1, 1), (A, B)])
def test_kernels_take_them_without_copies(lead: tuple[int, int]):
    q, k = (jax.ShapeDtypeStruct((*BATCH, n, N, 64), jnp.bfloat16) for n in (T, S + 1))
    bias = jax.ShapeDtypeStruct((*lead, N, T, S + 1), jnp.bfloat16)
    options: Any = {"implementation": "fa3"}

    def call(q: Array, k: Array, v: Array, bias: Array) -> Array:
        return jax_fa3.dot_product_attention(q, k, v, bias, **options)

    text = lower(call, q, k, k, bias)
    assert targets(text) == [_targets.FWD]
    assert operations(text) <= {"custom_call", "reshape", "broadcast_in_dim"}
    copies = [x for x in text.splitlines() if "broadcast_in_dim" in x and "tensor<0x" not in x]
    assert [x for x in copies if f"x{T}x" in x] == []
    assert jax_fa3.is_supported(q, k, k, bias, device="sm_90") is None
