"""Dense masks as bits on a Hopper GPU: what is made of a mask, and both passes over blocks of it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, Case
from dense_masks import INTERVALS, MASKS, RNG, S, T, bits_of
from helpers import assert_rounded, both_oracles, equal, poison, with_gradients

import jax_fa3
from jax_fa3 import _mask_bits
from jax_fa3._kernel_sizes import bwd_tile

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", [x for x, mask in MASKS.items() if 1 not in mask.shape[2:]])
@pytest.mark.parametrize("head_dim", [None, 64, 128])
def test_bits(name: str, head_dim: int | None):
    tile = None if head_dim is None else bwd_tile(head_dim)
    mask = MASKS[name]
    for given in (mask, mask[..., : S - 8]):  # rows of which the last are no whole vectors
        found = jax.jit(lambda x: _mask_bits.for_kernels(x, x.shape[3], tile))(given)
        turned = given if tile is None else given.swapaxes(2, 3)
        bits, in_blocks = bits_of(turned, 128 if tile is None else tile.block_m)
        np.testing.assert_array_equal(found["mask_bits"], bits)
        np.testing.assert_array_equal(found["mask_blocks"], in_blocks)


@pytest.mark.parametrize("name", INTERVALS)
@pytest.mark.parametrize("head_dim", [None, 64, 128])
def test_bits_of_intervals(name: str, head_dim: int | None):
    tile = None if head_dim is None else bwd_tile(head_dim)
    begin, end = INTERVALS[name].values()
    given = jnp.concatenate((begin, end), -1)[:, None].astype(jnp.int32)
    found = jax.jit(lambda x: _mask_bits.for_kernels(x, S, tile))(given)
    mask = np.asarray(_mask_bits.as_bool(given, S))
    turned = mask if tile is None else mask.swapaxes(2, 3)
    bits, in_blocks = bits_of(turned, 128 if tile is None else tile.block_m)
    np.testing.assert_array_equal(found["mask_blocks"], in_blocks)
    # Of blocks that nobody sees, 128 columns at least, there need be none.
    by_block = bits.reshape(*bits.shape[:2], -1, 128, bits.shape[3] // 4, 4)
    seen = np.broadcast_to(by_block.any((3, 5), keepdims=True), by_block.shape).reshape(bits.shape)
    np.testing.assert_array_equal(np.where(seen, found["mask_bits"], 0), bits)


attention = functools.partial(
    jax_fa3.dot_product_attention, return_residual=True, implementation="fa3"
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(case: Case, deterministic: bool, cotangents: Any, inputs: Any, mask: Any) -> Any:
    options: Any = {**case.arguments, "mask": mask, "deterministic_backward": deterministic}
    return with_gradients(functools.partial(attention, **options), cotangents, *inputs)


def check(case: Case, mask: Any, dtype: Any = jnp.bfloat16, deterministic: bool = False) -> Any:
    inputs, cotangents = case.inputs(dtype), case.cotangents(dtype)
    poison(case, dtype)
    found = run(case, deterministic, cotangents, inputs, mask)
    with_mask = (
        case if mask is None else dataclasses.replace(case, mask={**case.mask, "mask": mask})
    )
    exact, rounded = jax.jit(both_oracles, static_argnums=(0, 1))(
        with_mask, dtype, inputs, cotangents
    )
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)
    return found


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_is_right(name: str, head_dim: int, dtype: Any):
    check(Case(name, T, S, H=head_dim), MASKS[name], dtype)


def test_packed():
    case = Case("packed", T, T, 4, 4, H=64, mask=CAUSAL)
    mask = MASKS["blocks"][..., :T]
    with_mask = dataclasses.replace(case, mask={**case.mask, "mask": mask})
    inputs, cotangents = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)

    def packed(q: Any, k: Any, v: Any) -> Any:
        options: Any = {"implementation": "fa3", "return_residual": True, "mask": mask}
        return jax_fa3.qkv_dot_product_attention(jnp.stack((q, k, v), 2), **CAUSAL, **options)

    found = jax.jit(functools.partial(with_gradients, packed))(cotangents, *inputs)
    exact, rounded = both_oracles(with_mask, jnp.bfloat16, inputs, cotangents)
    assert_rounded(found, exact, rounded, case, jnp.finfo(jnp.bfloat16).eps)


def test_under_vmap():
    case = Case("vmap", T, S, H=128, B=1)
    inputs, masks = case.inputs(jnp.bfloat16), MASKS["blocks"]
    call = functools.partial(attention, *inputs)
    found, _ = jax.jit(jax.vmap(lambda mask: call(mask=mask)))(masks[:, None])
    for i in range(2):
        assert equal(found[i], call(mask=masks[i : i + 1])[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [72, 80, 96, 104])
@pytest.mark.parametrize("name", ["blocks", "other blocks"])
def test_head_dims(name: str, head_dim: int, dtype: Any):
    check(Case(name, T, S, H=head_dim, mask=CAUSAL), MASKS[name], dtype)


SINKS = (0.0, -2.0, 3.0, 1.5)
LENGTHS: dict[str, Any] = {
    "query_seq_lengths": np.array([500, 700], np.int32),
    "key_value_seq_lengths": np.array([1000, 333], np.int32),
}


@pytest.mark.parametrize(
    "head_dim, dtype", [(64, jnp.bfloat16), (128, jnp.bfloat16), (64, jnp.float16)]
)
@pytest.mark.parametrize("name", ["blocks", "blocks of all"])
@pytest.mark.parametrize("more", ["causal", "window", "lengths", "capped", "sinks"])
def test_beside(more: str, name: str, head_dim: int, dtype: Any):
    others: dict[str, Any] = {
        "causal": {"mask": CAUSAL},
        "window": {"mask": {"local_window_size": (200, 100)}},
        "lengths": {"mask": LENGTHS, "planted": True},
        "capped": {"logits_soft_cap": 3.0},
        "sinks": {"sinks": SINKS},
    }
    check(Case(f"{more} {name}", T, S, H=head_dim, **others[more]), MASKS[name], dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["blocks", "blocks of heads"])
def test_deterministic(name: str, head_dim: int):
    case = Case(f"deterministic {name}", T, S, H=head_dim)
    found = check(case, MASKS[name], deterministic=True)
    arrays = case.cotangents(jnp.bfloat16), case.inputs(jnp.bfloat16), MASKS[name]
    assert equal(found, run(case, True, *arrays))


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (3, 1)])
@pytest.mark.parametrize("of_heads", [False, True])
def test_few_keys(heads: tuple[int, int], of_heads: bool):
    """Several CTAs share the query rows of a block of keys."""
    shape = 1, heads[0] if of_heads else 1, 40, 3
    mask = np.kron(RNG.random(shape) < 0.4, np.ones((1, 1, 100, 128), bool))
    case = Case("few keys", 4000, 384, *heads, B=1, H=128)
    check(case, mask)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("values", ["means", "small"])
def test_values(values: str, dtype: Any):
    change: Any = {"means": lambda x: 1 + 0.3 * x, "small": lambda x: 1e-3 * x}[values]

    class Changed(Case):
        def inputs(self, dtype: Any, seed: int = 0) -> Any:
            return tuple(map(change, super().inputs(dtype, seed)))

    check(Changed(values, T, S, H=128), MASKS["blocks"], dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", INTERVALS)
def test_intervals(name: str, head_dim: int):
    """Beside a window, too, as is_causal is."""
    case = Case(f"intervals {name}", T, S, H=head_dim, mask={**CAUSAL, **INTERVALS[name]})
    check(case, None)


def test_many_blocks():
    """Words of blocks beyond the first, and what stands in the last."""
    rng = np.random.default_rng(3)
    mask = np.kron(rng.random((1, 1, 2, 47)) < 0.3, np.ones((1, 1, 128, 128), bool))
    mask &= rng.random((1, 1, 256, 1)) < 0.9
    for turned in (False, True):
        given = mask.swapaxes(2, 3) if turned else mask
        check(Case("many", *given.shape[2:], B=1, H=128), given)


def test_rows_that_see_nothing_may_hold_anything():
    """Hidden by the mask, and by it and the window together."""
    case = Case("blind", T, S, H=128)
    mask = MASKS["few blocks"].copy()
    mask[:, :, 100:300] = False
    q, k, v = case.inputs(jnp.bfloat16)
    dout, dlse = case.cotangents(jnp.bfloat16)
    call = functools.partial(run, case, False)
    usual = call((dout, dlse), (q, k, v), mask)
    bad = jnp.nan
    found = call(
        (dout.at[:, 100:300].set(bad), dlse.at[:, 100:300].set(bad)),
        (q.at[:, 100:300].set(bad), k, v),
        mask,
    )
    for x, y in zip(found[2:], usual[2:], strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=1e-2)
    assert not np.asarray(found.out[:, 100:300]).any()


def test_scores_that_are_nan():
    """Give NaN, as without a mask, and not 0."""
    q, k, v = Case("nan", T, S, H=128).inputs(jnp.bfloat16)
    out, _ = attention(q.at[:, 5].set(jnp.nan), k, v, mask=MASKS["everything"])
    assert jnp.isnan(out[:, 5]).all() and jnp.isfinite(out[:, 6:]).all()
