"""jax_fa3.integrations.tokamax in tokamax.dot_product_attention, against tokamax's own op."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integrations import (
    assert_no_further,
    assert_runs_kernels,
    assert_same_as_theirs,
    inputs,
    project,
)

from jax_fa3.integrations.tokamax import Attention

tokamax, base = project("tokamax", "tokamax", "tokamax._src.ops.attention.base")  # it has Mask
pytestmark = pytest.mark.usefixtures("on_cpu")
SHAPES = (2, 48, 4, 16), (2, 40, 2, 16), (2, 40, 2, 24)


def ours(**options: Any) -> Any:
    return partial(tokamax.dot_product_attention, implementation=[Attention()], **options)


def theirs(**options: Any) -> Any:
    return partial(tokamax.dot_product_attention, implementation="xla", **options)


CASES = {
    "full": {},
    "scale": {"is_causal": True, "scale": 0.3},
    "window": {"local_window_size": (12, 3)},
    "causal window": {"is_causal": True, "local_window_size": 12},
    "soft cap": {"is_causal": True, "logits_soft_cap": 2.0},
    "lengths": {
        "query_seq_lengths": jnp.array([48, 48]),
        "key_value_seq_lengths": jnp.array([1, 33]),
        "is_causal": True,
    },
    "bias": {"bias": jax.random.normal(jax.random.key(9), (1, 4, 48, 40))},
    "mask": {"mask": jnp.tri(48, 40, dtype=bool)},
    "soft cap of the sum": {
        "bias": jax.random.normal(jax.random.key(9), (1, 4, 48, 40)),
        "logits_soft_cap": 1.0,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_same_as_tokamax(name):
    assert_same_as_theirs(ours(**CASES[name]), theirs(**CASES[name]), inputs(SHAPES, jnp.float32))


@pytest.mark.parametrize("name", CASES)
def test_bf16(name):
    """The query's gradient is the same sum in both, of which a number or two may be rounded the other way."""
    pooled = name not in ("full", "soft cap")
    arrays = inputs(SHAPES, jnp.bfloat16)
    assert_no_further(ours(**CASES[name]), theirs(**CASES[name]), arrays, pooled=pooled)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_batch_axes(batch):
    shapes = [(*batch, *shape[1:]) for shape in SHAPES]
    options = {"is_causal": True, "bias": jnp.ones((4, 1, 40))}
    assert_same_as_theirs(ours(**options), theirs(**options), inputs(shapes, jnp.float32))


rows = np.random.default_rng(0).permutation(48)
MASKS = {
    "traced offset": (lambda x: base.CausalMask(offset=jnp.int32(x), window_size=9), 5, {}),
    "traced window": (lambda x: base.CausalMask(window_size=jnp.int32(x)), 4, {}),
    "k_start": (lambda x: base.Mask(k_start=x, is_causal=True), rows[None] % 30, {}),
    "k_end": (lambda x: base.Mask(k_end=x), 1 + rows[None, None] % 39, {}),
    "q_start": (lambda x: base.Mask(q_start=x, q_end=x + 30), np.array([[0]]), {}),
    "q_indices": (
        lambda _: base.CausalMask(window_size=20),
        0,
        {"q_indices": jnp.array(rows[None] % 40)},
    ),
    "k_start by head": (lambda x: base.Mask(k_start=x), np.arange(4 * 48).reshape(4, 48) % 30, {}),
    "q_end by key": (lambda x: base.Mask(q_end=x), 48 - np.zeros((1, 40), int), {}),
    "k_indices": (
        lambda _: base.CausalMask(offset=40),
        0,
        {"k_indices": jnp.arange(40)[None, ::-1]},
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    """Given as tokamax's ops take them. Rows that see no key, which differ, are left out."""
    make, value, options = MASKS[name]
    mask = make(jnp.asarray(value))
    full = mask if isinstance(mask, base.Mask) else base.Mask(causal_mask=mask)
    indices = options.get("q_indices", 48), options.get("k_indices", 40)
    seen = full.as_array(*indices).any(-1).swapaxes(-1, -2)[..., None]  # [.., T, N, 1]

    def masked(op: Any) -> Any:
        return lambda q, k, v: op(q, k, v, mask=mask, **options) * seen

    found = inputs(SHAPES, jnp.float32)
    assert_same_as_theirs(masked(Attention()), masked(base.DotProductAttention()), found)


@pytest.mark.parametrize("name", ["full", "causal window", "soft cap", "lengths"])
def test_these_reach_the_kernels(name):
    call = partial(tokamax.dot_product_attention, implementation=[Attention()], **CASES[name])
    assert_runs_kernels(call, inputs(SHAPES, jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", MASKS)
def test_masks_reach_the_kernels(name, dtype):
    """Those that differ between heads or are about other indices than the arrays' as bits."""
    make, value, options = MASKS[name]
    call = partial(Attention("fa3"), mask=make(jnp.asarray(value)), **options)
    assert_runs_kernels(call, inputs(SHAPES, dtype))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 136}, "mask: got one beside head dim 136, wanted none beside more than 128"),
        ({"bias": jnp.zeros((4, 48, 40))}, "mask: got one beside a bias, wanted one of the two"),
    ],
)
def test_dense_masks_that_the_kernels_might_not_take_are_refused(changes, message):
    options = dict(changes)
    width = options.pop("head_dim", 16)
    found = inputs([(*x[:-1], width) for x in SHAPES], jnp.bfloat16)
    options["mask"] = base.Mask(k_start=jnp.asarray(MASKS["k_start by head"][1]))
    with pytest.raises(NotImplementedError, match=message):
        Attention("fa3")(*found, **options)
    assert Attention()(*found, **options).shape == found[0].shape


REFUSED = {
    "dropout_rate: got 0.5": {"dropout_rate": 0.5, "dropout_mask": None},
    "paging_info: got ": {"paging_info": object()},
    "logits_dtype: got bfloat16, wanted float32": {"logits_dtype": jnp.bfloat16},
    "precision: got ": {"precision": ("highest", "default")},
    "normalize_output: got False": {"normalize_output": False},
    "return_residuals: got True": {"return_residuals": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message):
    with pytest.raises(NotImplementedError, match=message):
        Attention()(*inputs(SHAPES, jnp.float32), **REFUSED[message])


def test_quantized_arrays_are_refused():
    q, k, v = inputs(SHAPES, jnp.float32)
    quantized = pytest.importorskip("qwix").quantize(k, jnp.int8)
    with pytest.raises(NotImplementedError, match="k: got QArray, wanted a plain array"):
        Attention()(q, quantized, v)


def test_sharded():
    """q_sharding is this library's sharding."""
    found = inputs(SHAPES, jnp.float32)
    mesh = jax.sharding.Mesh(np.reshape(jax.devices("cpu")[:4], (2, 2)), ("x", "y"))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None, "y"))
    options = {"is_causal": True, "q_sharding": spec}
    assert_same_as_theirs(ours(**options), theirs(is_causal=True), jax.device_put(found, spec))


def test_the_next_implementation_takes_what_the_kernels_refuse():
    found = inputs(SHAPES, jnp.float32)  # the kernels take 16 bits
    both = tokamax.dot_product_attention(*found, implementation=[Attention("fa3"), "xla"])
    np.testing.assert_array_equal(both, theirs()(*found))
    with pytest.raises(NotImplementedError, match="query: got dtype float32, wanted bfloat16"):
        tokamax.dot_product_attention(*found, implementation=[Attention("fa3")])
