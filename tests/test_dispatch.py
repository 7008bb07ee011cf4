"""Which code runs: by the arguments, the machine, and the platform that is lowered for."""

import contextlib
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import hide_gpus, lower, operations, targets

import jax_fa3
from jax_fa3 import _dispatch, _ffi

FWD = "jax_fa3.fwd.v1"
KERNELS = [("bfloat16", 128, 128)]
_ffi_before = _ffi._C


def arguments(dtype: Any = jnp.bfloat16, head_dim: int = 64) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((2, 16, heads, head_dim), dtype) for heads in (4, 2, 2)]


def attention(implementation: Any = None, **options: Any) -> Any:
    def function(query, key, value):
        return jax_fa3.dot_product_attention(
            query, key, value, implementation=implementation, **options
        )

    return function


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Makes the machine one with GPUs of these capabilities and these kernels; at first with none."""

    def set_machine(*capabilities: str, kernels: Any = KERNELS, driver: int = 13000) -> None:
        functions = {"kernels": kernels, "driver_version": driver, "runtime_version": 13000}
        functions |= {"fwd_long_sums": 0, "fwd_splits": 1, "bwd_splits": 1}
        functions = {name: lambda *_, x=x: x for name, x in functions.items()}
        built = None if kernels is None else types.SimpleNamespace(**functions)
        monkeypatch.setattr(_ffi, "_C", built)
        monkeypatch.setattr(_dispatch, "compute_capabilities", lambda: set(capabilities))

    hide_gpus(monkeypatch)
    return set_machine


@contextlib.contextmanager
def warned(text: str):
    """Exactly one warning of this text, in the name of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    (warning,) = caught
    assert text in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize("kernels", [KERNELS, None, []])
def test_without_a_gpu_the_platform_decides(machine, kernels):
    machine(kernels=kernels)
    assert targets(lower(attention(), *arguments())) == [FWD]
    assert targets(lower(attention("fa3"), *arguments())) == [FWD]
    for implementation, platform in [(None, "cpu"), (None, "tpu"), (None, "rocm"), ("xla", "cuda")]:
        text = lower(attention(implementation), *arguments(), platform=platform)
        assert targets(text) == [] and "dot_general" in operations(text)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm"])
def test_fa3_is_not_lowered_for_other_platforms(platform):
    message = (
        rf"needs an NVIDIA Hopper GPU \(sm_90\); this is being lowered for platform {platform}"
    )
    with pytest.raises(NotImplementedError, match=f"{message}: use implementation='xla' or None"):
        lower(attention("fa3"), *arguments(), platform=platform)
    grad = jax.grad(lambda *x: attention("fa3")(*x).astype(jnp.float32).sum())
    with pytest.raises(NotImplementedError, match=message):
        lower(grad, *arguments(), platform=platform)


def test_fa3_does_not_run_on_cpu():
    cpu = jax.local_devices(backend="cpu")[0]
    query, key, value = (jax.device_put(jnp.zeros(x.shape, x.dtype), cpu) for x in arguments())
    with pytest.raises(NotImplementedError, match="lowered for platform cpu"):
        jax_fa3.dot_product_attention(query, key, value, implementation="fa3")


def test_hopper_gpu(machine):
    machine("9.0")
    assert targets(lower(attention(), *arguments())) == [FWD]
    assert jax_fa3.is_supported(*arguments()) is None


def test_hopper_gpu_left_unused(machine):
    machine("9.0")
    with warned("runs this on XLA. query: got dtype float32, wanted bfloat16 or float16"):
        text = lower(attention(), *arguments(jnp.float32))
    assert targets(text) == []
    with warned(
        "runs this on XLA. qkv: got head dim 12, wanted a multiple of 8: pad it with zeros"
    ):
        jax.eval_shape(lambda x: jax_fa3.qkv_dot_product_attention(x, 1), arguments(head_dim=12)[0])
    assert targets(lower(attention("xla"), *arguments(jnp.float32))) == []  # asked for: no warning


@pytest.mark.parametrize("kernels", [None, []])  # Python alone, and JAX_FA3_CUDA=OFF
def test_hopper_gpu_without_kernels(machine, kernels):
    machine("9.0", kernels=kernels)
    reason = "jax_fa3: got an install without CUDA kernels"
    with warned(reason):
        assert targets(lower(attention(), *arguments())) == []
    with pytest.raises(NotImplementedError, match=f"implementation='fa3': {reason}"):
        jax.eval_shape(attention("fa3"), *arguments())
    assert (jax_fa3.is_supported(*arguments()) or "").startswith(reason)


def test_other_gpu(machine):
    machine("8.9")
    reason = "device: got compute capability 8.9, wanted an NVIDIA Hopper GPU"
    assert targets(lower(attention(), *arguments())) == []
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(attention("fa3"), *arguments())
    assert (jax_fa3.is_supported(*arguments()) or "").startswith(reason)


@pytest.mark.parametrize(("driver", "cuda"), [(12080, "12.8"), (11040, "11.4")])
def test_driver_that_is_too_old(machine, driver, cuda):
    machine("9.0", driver=driver)
    wanted = "wanted one for CUDA 13.0 or newer: update it, or use implementation='xla'"
    reason = f"device: got an NVIDIA driver for CUDA {cuda}, {wanted}"
    with warned(reason):
        assert targets(lower(attention(), *arguments())) == []
    with pytest.raises(NotImplementedError, match=f"implementation='fa3': {reason}"):
        jax.eval_shape(attention("fa3"), *arguments())
    assert jax_fa3.is_supported(*arguments()) == reason


@pytest.mark.parametrize("driver", [13000, 13010, 14000, 0])  # 0: not known
def test_driver_that_is_new_enough(machine, driver):
    machine("9.0", driver=driver)
    assert targets(lower(attention(), *arguments())) == [FWD]
    assert jax_fa3.is_supported(*arguments()) is None


def test_versions_of_cuda():
    """The driver is asked without a context, and where there is none, too."""
    if _ffi_before is not None:
        driver, runtime = _ffi_before.driver_version(), _ffi_before.runtime_version()
        assert runtime >= 12000 and (driver == 0 or driver >= 11000)


def test_kernels_that_are_not_built(machine):
    machine(kernels=KERNELS)
    wanted = r"wanted at most one of those built: \[\(128, 128\)\]"
    with pytest.raises(NotImplementedError, match=rf"got head dims \(192, 192\) in .*, {wanted}"):
        jax.eval_shape(attention("fa3"), *arguments(head_dim=192))
    with pytest.raises(NotImplementedError, match=r"in float16, .*built: \[\]"):
        jax.eval_shape(attention("fa3"), *arguments(jnp.float16))


def test_is_supported_takes_shapes_values_and_bad_arguments():
    query, key, value = arguments()
    reason = "device: got no CUDA device, wanted an NVIDIA Hopper GPU (sm_90)"
    assert jax_fa3.is_supported(query, key, value) == reason
    options: dict[str, Any] = {"is_causal": True, "implementation": None, "return_residual": True}
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    zeros = jnp.zeros(query.shape, query.dtype)
    assert (
        jax_fa3.is_supported(zeros, key, value, key_value_seq_lengths=lengths, **options) == reason
    )
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    assert "scale: got a traced" in (jax_fa3.is_supported(query, key, value, scale=scalar) or "")
    bias = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    assert jax_fa3.is_supported(query, key, value, bias=bias) == reason
    found = jax_fa3.is_supported(query, key, value, bias=bias, logits_soft_cap=3.0)
    assert "logits_soft_cap: got one beside a bias" in (found or "")
    assert "key: got shape" in (jax_fa3.is_supported(query, zeros[1:], value) or "")


@pytest.mark.parametrize("machines", [[], ["9.0"], ["8.9"], ["9.0", "8.9"]])
def test_is_supported_on_a_hopper_elsewhere(machine, machines):
    """The arguments alone count, whatever this machine is; without kernels those of the default build."""
    for kernels in (_ffi.KERNELS, None, []):
        machine(*machines, kernels=kernels, driver=12000)
        assert (
            jax_fa3.is_supported(*arguments(head_dim=256), is_causal=True, device="sm_90") is None
        )
        reason = jax_fa3.is_supported(*arguments(head_dim=584), device="sm_90")
        assert reason is not None and reason.startswith(
            "query: got head dims (584, 584) in bfloat16"
        )
        assert "(576, 512)]" in reason and "pad" not in reason
        assert jax_fa3.is_supported(*arguments(jnp.float32), device="sm_90") is not None
    machine(*machines)
    reason = jax_fa3.is_supported(*arguments(head_dim=256), device="sm_90")
    assert reason is not None and "those built: [(128, 128)]" in reason
    with pytest.raises(ValueError, match="device: got 'sm_100', wanted None or 'sm_90'"):
        jax_fa3.is_supported(*arguments(), device="sm_100")


def test_compute_capabilities(monkeypatch):
    monkeypatch.undo()
    hopper = types.SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda *, backend: [hopper, hopper])
    assert _dispatch.compute_capabilities() == {"9.0"}

    def no_backend(*, backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", no_backend)
    assert _dispatch.compute_capabilities() == set()


def test_run_in_an_eager_call_follows_its_operands():
    """Not JAX's default platform."""
    x = jax.device_put(np.ones(1), jax.local_devices(backend="cpu")[0])
    assert _dispatch.run(None, _add, _subtract, (3,), ("b",), ("b",), x)[0] == 2.0


def _add(static: int, x: Any) -> Any:
    return (static + x,)


def _subtract(static: int, x: Any) -> Any:
    return (static - x,)
