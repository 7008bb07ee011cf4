"""A process with Hopper GPUs and others: what runs is decided by the devices that it runs on."""

import functools
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, targets

import jax_fa3
from jax_fa3 import _devices, _dispatch, _sharding

HOPPERS = {2, 3}  # the ids of the CPUs that play Hopper GPUs
UNKNOWN = "for which of them this is lowered is not known here: pass implementation='fa3'"


def cpus(*ids: int) -> list[Any]:
    return [jax.local_devices(backend="cpu")[i] for i in ids]


@pytest.fixture(autouse=True)
def mixed(monkeypatch, on_cpu):
    monkeypatch.setattr(_dispatch, "compute_capabilities", lambda: {"8.0", "9.0"})
    monkeypatch.setattr(_dispatch, "machine_refusal", lambda: None)
    monkeypatch.setattr(_devices, "is_hopper", lambda device: device.id in HOPPERS)


@pytest.fixture
def cuda(monkeypatch):
    """CPUs count as CUDA devices."""

    def platform_dependent(*operands: Any, cuda: Any, default: Any) -> Any:
        return cuda(*operands)

    monkeypatch.setattr(_dispatch.lax, "platform_dependent", platform_dependent)


def make_function(implementation: Any = None) -> Any:
    """1 where the kernels run, else 2, of an array [B, ...]; no trace of another test is its."""

    def call(x: Any) -> Any:
        functions = (lambda x: (0 * x + 1,)), (lambda x: (0 * x + 2,))
        return _dispatch.run(implementation, *functions, (), ("b",), ("b",), x)[0]

    return call


@pytest.mark.parametrize(("device", "runs"), [(0, 2), (1, 2), (2, 1), (3, 1)])
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_committed_arrays(cuda, device, runs, jit):
    assert jit(make_function())(jax.device_put(np.zeros(4), *cpus(device))).tolist() == [runs] * 4


def test_one_function_on_several_devices(cuda):
    function = jax.jit(make_function())
    for device, runs in [(2, 1), (0, 2), (3, 1), (1, 2), (2, 1)]:
        assert function(jax.device_put(np.zeros(1), *cpus(device))).tolist() == [runs]


@pytest.mark.parametrize(("device", "runs"), [(1, 2), (3, 1)])
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_default_device(cuda, device, runs, jit):
    with jax.default_device(*cpus(device)):
        assert jit(make_function())(jnp.zeros(1)).tolist() == [runs]
        committed = jax.device_put(np.zeros(1), *cpus(0))
        assert jit(make_function())(committed).tolist() == [2]


@pytest.mark.parametrize("implementation", ["fa3", "xla"])
@pytest.mark.parametrize("device", [0, 2])
def test_without_fallback_the_user_is_trusted(cuda, implementation, device):
    x = jax.device_put(np.zeros(1), *cpus(device))
    assert make_function(implementation)(x).tolist() == [1 if implementation == "fa3" else 2]


@pytest.mark.parametrize(("devices", "runs"), [((0, 1), 2), ((1, 2), 2), ((2, 3), 1), ((3, 0), 2)])
@pytest.mark.parametrize("manual", [True, False])
def test_automatic_mesh(cuda, devices, runs, manual):
    mesh = Mesh(np.array(cpus(*devices)), ("x",), axis_types=(AxisType.Auto,))
    x = jax.device_put(np.zeros(4), NamedSharding(mesh, P("x")))
    function = make_function()
    if manual:
        function = jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    assert jax.jit(function)(x).tolist() == [runs] * 4


@pytest.mark.parametrize(("devices", "runs"), [((0, 1), 2), ((2, 3), 1), ((3, 0), 2)])
def test_explicit_mesh(cuda, devices, runs):
    """JAX lowers what is on one without its devices, unless jax.set_mesh says them."""
    mesh = Mesh(np.array(cpus(*devices)), ("x",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(np.zeros(4), NamedSharding(mesh, P("x")))

    def function(x: Any) -> Any:
        call = make_function()
        return _sharding.over_named_axes(lambda x: (call(x),), ("b",), ("b",))(x)[0]

    with jax.set_mesh(mesh):
        assert jax.jit(function)(x).tolist() == [runs] * 4
    with pytest.warns(UserWarning, match=UNKNOWN):
        assert jax.jit(lambda x: function(x))(x).tolist() == [2] * 4


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("device", [1, 3])
def test_attention(differentiate, device):
    """Lowered for CUDA, both are in the program, and a constant between them."""
    q = jax.device_put(jnp.ones((2, 16, 2, 64), jnp.bfloat16), *cpus(device))

    def loss(q: Any) -> Any:
        out = jax_fa3.dot_product_attention(q, q, q, is_causal=True, logits_soft_cap=1.0 + device)
        return out.astype(jnp.float32).sum()

    text = lower(jax.grad(loss) if differentiate else loss, q)
    expected = ["jax_fa3.fwd.v1", "jax_fa3.bwd.v1"][: 1 + differentiate]
    assert targets(text) == expected
    truth = "true" if device in HOPPERS else "false"
    assert len(re.findall(rf"constant dense<{truth}> : tensor<i1>", text)) >= len(expected)


def test_other_processes_are_as_before(monkeypatch):
    q = jnp.ones((2, 16, 2, 64), jnp.bfloat16)
    monkeypatch.setattr(_dispatch, "compute_capabilities", lambda: {"9.0"})
    text = lower(lambda q: jax_fa3.dot_product_attention(q, q, q), q)
    assert targets(text) == ["jax_fa3.fwd.v1"] and "tensor<i1>" not in text


def test_is_supported():
    """Of arrays that are somewhere, or where JAX would put them."""
    q = jnp.ones((2, 16, 2, 64), jnp.bfloat16)
    ask = functools.partial(_ask, q.shape, q.dtype)
    reason = r"device: got .*, wanted this process's Hopper GPU: move the arrays, or use "
    assert re.match(reason, ask(0)) and re.match(reason, ask(0, default=2))
    assert ask(2) == ask(3, default=0) == ask(None, default=3) == ""
    assert re.match(reason, ask(None, default=1))


def _ask(shape: Any, dtype: Any, device: int | None, default: int = 0) -> str:
    x = jax.ShapeDtypeStruct(shape, dtype)
    if device is not None:
        x = jax.device_put(jnp.ones(shape, dtype), *cpus(device))
    with jax.default_device(*cpus(default)), warnings.catch_warnings():
        warnings.simplefilter("error")
        return jax_fa3.is_supported(x, x, x) or ""
