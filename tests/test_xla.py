"""_xla against the oracle on the table, and what only the XLA path promises."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NUM_SIZES, TABLE, Case
from helpers import Results, assert_rounded, assert_same, oracle, with_gradients
from jax import Array
from jax.test_util import check_grads
from masks import ints

import jax_fa3
from jax_fa3 import _arguments, _mask, _reference, _row_blocks, _xla
from jax_fa3._operands import Operands, Rows
from jax_fa3._problem import Config, Sizes

CASES = {case.name: case for case in TABLE}
# Sizes around the kernels' tiles, of which plain JAX knows nothing, and all other cases.
_SIZES, _MASKS = TABLE[:NUM_SIZES], TABLE[NUM_SIZES:]
attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="xla", return_residual=True
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch):
    """So that small cases have several blocks."""
    monkeypatch.setattr(_row_blocks, "BLOCK_SCORES", 2**17)


def from_residuals(case: Case, inputs: Any, cotangents: Any, results: Results) -> Results:
    """The results with the gradients of _xla.backward."""
    sizes = Sizes(case.B, case.T, case.S, case.N, case.K, case.H, case.V or case.H)
    masks, window, segment_ids = _arguments.parse_masks(sizes, True, **case.mask)
    if segment_ids is not None:
        masks = _mask.with_segments(masks, segment_ids, "xla")
    config = Config(case.scale or case.H**-0.5, window, case.logits_soft_cap, False)
    lse = results.lse.swapaxes(1, 2)
    dout, dlse = cotangents[0], cotangents[1].swapaxes(1, 2)
    grads = _xla.backward(config, Operands(*inputs), masks, Rows(None, lse, dout, dlse))
    return Results(results.out, results.lse, *grads)


@functools.partial(jax.jit, static_argnums=(0, 1))
def computed(case: Case, dtype: Any, inputs: Any, cotangents: Any) -> tuple[Results, ...]:
    """By autodiff, by _xla.backward, by the oracle, and for 16-bit dtypes by the rounded oracle."""
    call = functools.partial(attention, **case.arguments)
    found = with_gradients(call, cotangents, *inputs)
    backward = from_residuals(case, inputs, cotangents, found)
    exact = oracle(case, dtype, inputs, cotangents)
    if jnp.finfo(dtype).bits >= 32:
        return found, backward, exact
    return found, backward, exact, oracle(case, dtype, inputs, cotangents, rounded=True)


@pytest.mark.parametrize("case", _SIZES[::3] + _MASKS, ids=str)
def test_table(case: Case):
    """Values and gradients, also of the log-sum-exp; planted NaN must not show."""
    inputs, cotangents = case.inputs(jnp.float32), case.cotangents(jnp.float32)
    with jax.default_matmul_precision("highest"):
        found, backward, exact = computed(case, jnp.float32, inputs, cotangents)
    assert_same(found, exact, rtol=1e-5)
    assert_same(backward, exact, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", TABLE[3::14], ids=str)
def test_16_bit(case: Case, dtype: Any):
    """By the rule of tolerance that the kernels have to meet."""
    inputs, cotangents = case.inputs(dtype), case.cotangents(dtype)
    found, backward, exact, rounded = computed(case, dtype, inputs, cotangents)
    assert found.out.dtype == backward.dk.dtype == dtype and found.lse.dtype == jnp.float32
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)
    assert_rounded(backward, exact, rounded, case, jnp.finfo(dtype).eps)


def test_fp64():
    case = CASES["documents, padding"]
    with jax.enable_x64(True):
        inputs, cotangents = case.inputs(jnp.float64), case.cotangents(jnp.float64)
        found, backward, exact = computed(case, jnp.float64, inputs, cotangents)
        assert {x.dtype for x in (*found, *backward)} == {jnp.dtype(jnp.float64)}
        assert_same(found, exact, rtol=1e-13)
        assert_same(backward, exact, rtol=1e-13)


SMALL = Case("small", 20, 26, H=8, V=5, mask={"is_causal": True, "query_offset": ints(3, -4)})


@pytest.mark.parametrize(
    ("bias", "mask"),
    [((2, 4, 20, 26), (1, 1, 20, 26)), ((1, 4, 1, 26), None), (None, (2, 1, 1, 26)), ((1, 1), ())],
)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_dense(monkeypatch: pytest.MonkeyPatch, bias: Any, mask: Any, soft_cap: Any):
    """bias and mask in every broadcastable shape, a scale that is traced and negative, and the
    derivatives of bias and scale."""
    monkeypatch.setattr(_row_blocks, "BLOCK_SCORES", 2**10)
    rng = np.random.default_rng(0)
    if bias is not None:
        bias = rng.standard_normal(bias, np.float32)
        bias[..., 0] = -np.inf if bias.ndim == 4 else 0.3
    if mask is not None:
        mask = jnp.asarray(rng.random(mask) < 0.8)

    def losses(function: Any) -> Any:
        @jax.jit
        def loss(inputs: Any, scale: Any, bias: Any) -> Array:
            options = {"logits_soft_cap": soft_cap, "bias": bias, "mask": mask, **SMALL.mask}
            out, lse = function(*inputs, scale=scale, **options)
            seen = lse != -jnp.inf
            return (out**2).sum() + jnp.where(seen, lse, 0).sum() / 3 + 5 * seen.sum()

        return jax.value_and_grad(loss, (0, 1, 2))

    arguments = (SMALL.inputs(jnp.float32), jnp.float32(-0.4), bias)
    with jax.default_matmul_precision("highest"):
        found, exact = losses(attention)(*arguments), losses(_four_axes)(*arguments)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-5), found, exact)


def _four_axes(*inputs: Array, bias: Any, mask: Any, **options: Any) -> Any:
    """The oracle, whose bias and mask need all axes."""
    bias, mask = (
        x if x is None else jnp.reshape(x, (1,) * (4 - jnp.ndim(x)) + jnp.shape(x))
        for x in (bias, mask)
    )
    return _reference.attention(*inputs, bias=bias, mask=mask, **options)


def test_forward_mode_and_second_derivatives(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_row_blocks, "BLOCK_SCORES", 2**9)
    case = Case("tiny", 20, 7, N=2, K=1, H=3, V=2, B=1, mask={"key_value_seq_lengths": ints(6)})
    with jax.enable_x64(True):
        call = functools.partial(attention, logits_soft_cap=3.0, **case.mask)
        inputs = case.inputs(jnp.float64)
        check_grads(call, inputs, order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


def test_a_nan_that_a_row_sees_stays():
    q, k, v = Case("nan", 64, 64, B=1, mask={"is_causal": True}).inputs(jnp.float32)
    q = q.at[0, 40, 1].set(jnp.nan)
    k = k.at[0, 50, 1].set(jnp.nan)
    out, lse = attention(q, k, v, is_causal=True)
    nan = np.zeros((1, 64, 4), bool)
    nan[0, 40, 1] = nan[0, 50:, 2:] = True
    np.testing.assert_array_equal(np.isnan(lse), nan)
    np.testing.assert_array_equal(np.isnan(out).any(-1), nan)


@pytest.mark.parametrize(
    "sizes", [(0, 3, 4, 2, 1), (2, 0, 4, 2, 1), (2, 3, 0, 2, 1), (2, 3, 4, 0, 2)]
)
def test_nothing_in_it(sizes: Any):
    b, t, s, n, k = sizes
    case = Case("nothing", t, s, n, k, 8, 8, b, {"is_causal": True})
    found = with_gradients(
        functools.partial(attention, **case.arguments),
        case.cotangents(jnp.float32),
        *case.inputs(jnp.float32),
    )
    assert [x.shape for x in found[2:]] == list(case.shapes[:3])
    assert found.out.shape == case.shapes[3] and found.lse.shape == case.shapes[3][:3]
    assert not found.out.any() and (found.lse == -jnp.inf).all()
    assert not any(x.any() for x in found[2:])
