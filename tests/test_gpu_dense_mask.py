"""Dense masks on a Hopper GPU, of all kinds: as bits; of wide heads and beside a bias as intervals where
each row is one. Blocks of them: test_gpu_mask_bits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from helpers import assert_rounded, both_oracles, equal, with_gradients

import jax_fa3

pytestmark = pytest.mark.gpu

attention = functools.partial(jax_fa3.dot_product_attention, return_residual=True)
T, S = 200, 260
CAUSAL = np.tri(T, S, 60, bool)[None, None]
PADDING = (np.arange(S) < np.array([[250], [77]]))[:, None, None]
RANDOM = np.random.default_rng(0).random((2, 1, T, S)) < 0.5
MASKS = {
    "causal": CAUSAL,
    "padding": PADDING,
    "both": CAUSAL & PADDING,
    "of each head": np.broadcast_to(CAUSAL, (1, 4, T, S)),
    "nothing": np.zeros((1, 1, T, 1), bool),
    "random": RANDOM,
    "heads differ": np.stack([CAUSAL[0, 0]] * 3 + [~CAUSAL[0, 0]])[None],
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(
    case: Case, implementation: Any, dtype: Any, cotangents: Any, inputs: Any, mask: Any
) -> Any:
    options: Any = {**case.arguments, "implementation": implementation, "mask": mask}
    return with_gradients(functools.partial(attention, **options), cotangents, *inputs)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", MASKS)
def test_is_right(name: str, head_dim: int):
    case = Case(name, T, S, H=head_dim, mask={"local_window_size": (90, 90)})
    mask, dtype = MASKS[name], jnp.bfloat16
    inputs, cotangents = case.inputs(dtype), case.cotangents(dtype)
    found = run(case, None, dtype, cotangents, inputs, mask)
    with_mask = dataclasses.replace(case, mask={**case.mask, "mask": mask})
    exact, rounded = jax.jit(both_oracles, static_argnums=(0, 1))(
        with_mask, dtype, inputs, cotangents
    )
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)
    if head_dim <= 128 or name not in ("random", "heads differ"):  # and no other way
        fa3 = run(case, "fa3", dtype, cotangents, inputs, mask)
        assert equal(fa3[:2], found[:2])


@pytest.mark.parametrize("name", ["random", "heads differ"])
def test_of_wide_heads(name: str):
    """There the kernels take intervals alone: rows of several are NaN, as those of a broken segment."""
    case = Case(name, T, S, H=256)
    inputs, cotangents = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    found = run(case, "fa3", jnp.bfloat16, cotangents, inputs, MASKS[name])
    assert np.isnan(np.asarray(found.out, np.float32)).all()


def test_vmap():
    """Entries with an interval beside others that have none."""
    q, k, v = Case("vmap", T, S).inputs(jnp.bfloat16)
    masks = jnp.stack([jnp.broadcast_to(jnp.asarray(x), RANDOM.shape) for x in (CAUSAL, RANDOM)])
    call = functools.partial(attention, q, k, v)
    found = jax.jit(jax.vmap(lambda mask: call(mask=mask)))(masks)
    for i in range(2):
        wanted = call(mask=masks[i], implementation="xla")
        for x, y in zip((x[i] for x in found), wanted, strict=True):
            x, y = (np.asarray(a, np.float32) for a in (x, y))
            np.testing.assert_allclose(x, y, rtol=0, atol=0.02)


def test_only_one_of_the_two_runs():
    """Beside a bias: a conditional, under vmap too, with a kernel in each way."""
    q, k, v = Case("one", T, S).inputs(jnp.bfloat16)
    bias = jnp.zeros((1, 1, 1, S), jnp.bfloat16)
    call = functools.partial(jax_fa3.dot_product_attention, q, k, v, bias)
    for function in (lambda m: call(mask=m), jax.vmap(lambda m: call(mask=m))):
        masks = jnp.asarray(CAUSAL) if function.__name__ == "<lambda>" else jnp.stack([CAUSAL] * 2)
        text = jax.jit(function).lower(masks).compile().as_text()
        assert text is not None and " conditional(" in text
        assert text.count('custom_call_target="jax_fa3.fwd.v1"') == 2
