"""Dense masks as intervals, where the kernels do not take bits: who is taken for one, and that only one
of the two ways runs. Several intervals a row: test_several_intervals."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from helpers import assert_same, oracle, with_gradients
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, operations, targets
from test_ffi import needs_kernels

import jax_fa3
from jax_fa3 import _dense_mask, _dispatch, _targets, _xla
from jax_fa3._operands import Operands
from jax_fa3._problem import Config, Masks

B, T, S, N, K, H = 2, 10, 12, 4, 2, 136  # a head dim whose kernels take no bits
CONFIG = Config(0.5, (None, None), None, False)
NO_MASKS = Masks()
CAUSAL = np.tri(T, S, 2, bool)[None, None]
PADDING = (np.arange(S) < np.array([[12], [5]]))[:, None, None]
INTERVALS = {
    "causal": CAUSAL,
    "padding": PADDING,
    "both": CAUSAL & PADDING,
    "of each head": np.broadcast_to(CAUSAL, (1, N, T, S)),
    "nothing": np.zeros((1, 1, T, 1), bool),
    "everything": np.ones((B, 1, 1, 1), bool),
    "rows": np.arange(T)[:, None] % 3 > 0,
}
OTHERS = {
    "random": np.random.default_rng(0).random((B, 1, T, S)) < 0.5,
    "heads differ": np.stack([CAUSAL[0, 0], ~CAUSAL[0, 0], *[CAUSAL[0, 0]] * 2])[None],
    "one hole": np.arange(S) != 4,
}


@pytest.mark.parametrize("name", INTERVALS | OTHERS)
def test_intervals(name: str):
    mask = (INTERVALS | OTHERS)[name]
    begin, end, broken = jax.jit(_dense_mask.intervals)(mask)
    assert begin.shape == end.shape == broken.shape == mask.shape[:-1]
    for row in np.ndindex(mask.shape[:-1]):
        seen = np.flatnonzero(mask[row])
        assert bool(broken[row]) == bool(len(seen) and seen[-1] - seen[0] + 1 != len(seen))
        if not broken[row]:
            wanted = (seen[0], seen[-1] + 1) if len(seen) else (0, 0)
            assert (begin[row], end[row]) == wanted


def operands(mask: Any, **more: Any) -> Operands:
    rng = np.random.default_rng(1)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    tensors = (jnp.asarray(rng.normal(0.3, 1, shape), jnp.float32) for shape in shapes)
    mask = jnp.asarray(mask).reshape((1,) * (4 - np.ndim(mask)) + np.shape(mask))
    return Operands(*tensors, mask=mask, **more)


def kernel(config: Config, operands: Operands, masks: Masks) -> tuple[Array, ...]:
    """Instead of a kernel, so that it runs here; its log-sum-exp says that it was told intervals."""
    assert masks.key_begin is not None and masks.key_end is not None
    out, lse = _xla.attention(config, operands, masks)
    return out, lse + (1000 if operands.mask is None else 0)


ON_CUDA = _dense_mask.by_intervals(kernel, _xla.attention)


def attend(operands: Operands, masks: Masks = NO_MASKS) -> tuple[Array, Array, Array]:
    """out, lse, and which entries were intervals to the kernel; as the library does it on a GPU."""
    per_mask = jax.tree.map(lambda x: "b" + "." * (x.ndim - 1), masks)
    letters, results = (operands.letters, per_mask), operands.result_letters
    static = None, ON_CUDA, ON_CUDA, (CONFIG,), letters, results
    out, lse = _dispatch.run(*static, operands, masks)
    by_kernel = (lse > 500).any((-1, -2))
    return out, jnp.where(lse > 500, lse - 1000, lse), by_kernel


@pytest.mark.parametrize("name", INTERVALS | OTHERS)
def test_intervals_are_told_from_others_and_both_are_right(name: str):
    """With the call's other masks, which may make an interval of nothing else."""
    given = operands((INTERVALS | OTHERS)[name])
    begin = jnp.tile(jnp.arange(T) % 4, (B, 1))
    for masks in (Masks(), Masks(key_begin=begin), Masks(key_begin=begin, key_end=begin + 5)):
        out, lse, by_kernel = jax.jit(attend)(given, masks)
        exact = _xla.attention(CONFIG, given, masks)
        np.testing.assert_allclose(out, exact[0], atol=1e-5)
        np.testing.assert_allclose(lse, exact[1], atol=1e-3)
        assert by_kernel.all() == (name in INTERVALS) or name == "nothing"
        assert by_kernel.any() == (name in INTERVALS) or name == "nothing"


def test_under_vmap_all_entries_go_one_way():
    """There is a conditional, not a selection between both."""
    masks = jnp.stack([jnp.broadcast_to(x, (1, 1, T, S)) for x in (CAUSAL, CAUSAL[..., ::-1])])
    one = operands(CAUSAL)
    call = jax.vmap(lambda mask: attend(dataclasses.replace(one, mask=mask)))
    assert "stablehlo.case" in lower(call, masks, platform="cpu")
    assert call(masks)[2].all()
    mixed = masks.at[1, :, :, :, 4].set(False)
    out, lse, by_kernel = call(mixed)
    assert not by_kernel.any()
    for i in range(2):
        exact = _xla.attention(CONFIG, dataclasses.replace(one, mask=mixed[i]), Masks())
        np.testing.assert_allclose(out[i], exact[0], atol=1e-5)
        np.testing.assert_allclose(lse[i], exact[1], atol=1e-3)


@pytest.mark.parametrize("heads", [1, N])
def test_each_device_looks_at_its_own(heads: int):
    """An entry that is none changes no other device's way."""
    mask = np.repeat(np.repeat(CAUSAL, B, 0), heads, 1)
    mask[1, :, :, 4] = False
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    where = NamedSharding(mesh, P("x"))
    given = jax.tree.map(lambda x: jax.device_put(x, where), operands(mask))
    out, _, by_kernel = jax.jit(attend)(given)
    assert by_kernel.tolist() == [True, False]
    exact = _xla.attention(CONFIG, operands(mask), Masks())
    np.testing.assert_allclose(out, exact[0], atol=1e-5)


def test_others_of_wide_heads_beside_a_soft_cap():
    """Without fallback such rows are NaN."""
    capped = dataclasses.replace(CONFIG, logits_soft_cap=3.0)
    rows = np.ones((B, 1, T, S), bool)
    rows[1, :, 3, 5] = False
    found = _dense_mask.by_intervals(kernel, None)(capped, operands(rows), Masks())
    assert np.isnan(found[0]).all((2, 3)).tolist() == [[False] * T, [i == 3 for i in range(T)]]
    assert np.isfinite(found[0][0]).all()
    found = ON_CUDA(capped, operands(rows), Masks())
    np.testing.assert_allclose(
        found[0], _xla.attention(capped, operands(rows), Masks())[0], atol=1e-5
    )


@pytest.mark.parametrize("kind", [None, AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("name", ["both", "random", "heads differ"])
def test_gradients(name: str, kind: Any):
    """Through the one custom_vjp, with sinks and a window; where the kernels are not, all by plain JAX."""
    mask = (INTERVALS | OTHERS)[name]
    arguments: dict[str, Any] = {"mask": mask, "local_window_size": 6}
    case = Case(name, T, S, N, K, H, B=B, mask=arguments, sinks=(0.0, 1.0, -1.0, 2.0))
    inputs, cotangents = case.inputs(jnp.float32), case.cotangents(jnp.float32)
    call = functools.partial(jax_fa3.dot_product_attention, return_residual=True)
    exact = oracle(case, jnp.float32, inputs, cotangents)

    @jax.jit
    def run(cotangents: Any, mask: Any, *inputs: Any) -> Any:
        function = functools.partial(call, **case.arguments | {"mask": mask})
        return with_gradients(function, cotangents, *inputs)

    if kind is None:
        assert_same(run(cotangents, mask, *inputs), exact, rtol=1e-5)
        return
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        put = functools.partial(jax.device_put, device=NamedSharding(mesh, P("x")))
        whole = np.broadcast_to(mask, (B, *mask.shape[1:]))
        found = run(jax.tree.map(put, cotangents), put(whole), *map(put, inputs))
        assert_same(found, exact, rtol=1e-5)


def test_lengths_that_are_symbolic():
    """The mask is looked at; several intervals, for which the kernels want a number, go to XLA."""
    case = Case("symbolic", T, S, N, K, H=64, B=B)
    mask = np.random.default_rng(0).random((B, 1, T, S)) < 0.7
    bounds = np.zeros((B, T, 2), np.int32), np.full((B, T, 2), (3, 5), np.int32)
    for names, arrays in ((("mask",), (mask,)), (("key_begin", "key_end"), bounds)):

        def call(*x: Any, names: Any = names) -> Any:
            options: Any = dict(zip(names, x[3:], strict=True))
            return jax_fa3.dot_product_attention(*x[:3], **options)

        given = *case.inputs(jnp.bfloat16), *map(jnp.asarray, arrays)
        b, t, s = jax.export.symbolic_shape("b, t, s")
        size = {B: b, T: t, S: s}
        shapes = [tuple(size.get(n, n) for n in x.shape[:2]) + x.shape[2:] for x in given]
        if names == ("mask",):
            shapes[3] = (b, 1, t, s)
        symbolic = [jax.ShapeDtypeStruct(n, x.dtype) for n, x in zip(shapes, given, strict=True)]
        exported = jax.export.export(jax.jit(call))(*symbolic)
        np.testing.assert_array_equal(exported.call(*given), jax.jit(call)(*given))


@needs_kernels
def test_kernels_take_them():
    """As bits, without a look at the values; beside a bias, one kernel for either way."""
    shapes = [
        jax.ShapeDtypeStruct((B, n, k, 64), jnp.bfloat16) for n, k in ((T, N), (S, K), (S, K))
    ]
    mask = jax.ShapeDtypeStruct((B, 1, T, S), jnp.bool_)

    def loss(implementation: Any, **more: Any) -> Any:
        def call(q: Array, k: Array, v: Array, mask: Array) -> Array:
            options: Any = {"mask": mask, "implementation": implementation, **more}
            return jax_fa3.dot_product_attention(q, k, v, **options).astype(jnp.float32).sum()

        return jax.grad(call, (0, 1, 2))

    for implementation in (None, "fa3"):
        text = lower(loss(implementation), *shapes, mask)
        bits = _targets.MASK_BITS
        assert targets(text) == [bits, _targets.FWD, bits, _targets.BWD]
        assert not {"dot_general", "case"} & set(operations(text))
        text = lower(
            loss(implementation, bias=jnp.zeros((1, N, 1, S), jnp.bfloat16)), *shapes, mask
        )
        assert targets(text) == [_targets.FWD] * 2 + [_targets.BWD] * 2
        assert "dot_general" not in operations(text)
    assert jax_fa3.is_supported(*shapes, mask=mask, device="sm_90") is None
