"""The kernels of calls under forward mode, by what they lower to for CUDA."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, targets
from meshes import make_mesh
from test_forward_mode import MASKS, QKV, SPEC, B, H, K, N, S, T, attention, pushed

FWD, BWD, JVP = "jax_fa3.fwd.v1", "jax_fa3.bwd.v1", "jax_fa3.jvp.v1"

pytestmark = pytest.mark.usefixtures("on_cpu")


def lowered(function: Any, *shapes: tuple[int, ...], sharding: Any = None) -> str:
    """Of a jvp along all operands, for CUDA."""
    structs = [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=sharding) for x in (*shapes, *shapes)]
    return lower(pushed(function), *structs)


@pytest.mark.parametrize(
    ("dims", "options", "kernels"),
    [
        ((64, 64), {"is_causal": True, "sinks": jnp.ones(N), "logits_soft_cap": 2.0}, [FWD, JVP]),
        ((72, 128), {}, [FWD, JVP]),
        ((256, 192), {}, [FWD, JVP]),
        # The tangent's where each row sees one interval.
        ((64, 64), {"mask": MASKS[-1]["mask"]}, ["jax_fa3.mask_bits.v1", FWD, JVP]),
        ((64, 64), {"bias": jnp.ones((T, S))}, [FWD]),
    ],
)
def test_which_tangents_have_a_kernel(dims, options, kernels):
    shapes = (B, T, N, dims[0]), (B, S, K, dims[0]), (B, S, K, dims[1])
    assert targets(lowered(attention("fa3", **options), *shapes)) == kernels


def test_very_many_keys_have_none():
    """One accumulator would lose what it cuts off."""
    shapes = (1, 16, 1, 64), (1, 2**18 + 1, 1, 64), (1, 2**18 + 1, 1, 64)
    assert targets(lowered(attention("fa3"), *shapes)) == [FWD]


@pytest.mark.parametrize("way", ["explicit", "shard_map"])
def test_the_kernel_has_a_devices_part(way):
    mesh = make_mesh(AxisType.Explicit if way == "explicit" else AxisType.Auto, dp=2, tp=2)
    function = attention("fa3", is_causal=True)
    if way == "shard_map":
        out_specs = SPEC, P("dp", None, "tp")
        function = jax.shard_map(function, mesh=mesh, in_specs=(SPEC,) * 3, out_specs=out_specs)
    with jax.set_mesh(mesh):
        text = lowered(function, *(x.shape for x in QKV), sharding=NamedSharding(mesh, SPEC))
    (line,) = (x for x in text.splitlines() if JVP in x and "custom_call" in x)
    operands = line.split(" : (")[1]
    assert operands.startswith(f"tensor<1x{T}x{N // 2}x{H}xbf16>, tensor<1x{S}x{K // 2}x{H}xbf16>")


def test_vmapped_calls_are_one():
    text = lowered(jax.vmap(attention("fa3")), *((3, *x.shape) for x in QKV))
    assert targets(text) == [FWD, JVP]
    assert f"tensor<{3 * B}x{T}x{N}x{H}xbf16>" in text


def test_reverse_mode_is_as_it_was():
    operands = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in QKV]
    loss = lambda *x: sum(y.astype(jnp.float32).sum() for y in attention("fa3")(*x))
    assert targets(lower(jax.grad(loss, (0, 1, 2)), *operands)) == [FWD, BWD]
