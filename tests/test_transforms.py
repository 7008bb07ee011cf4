"""JAX's transformations, with the axes of a mesh as well: remat, scan, jacrev, donation, export, and
a compilation cache that hits in the next process."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, targets
from meshes import AUTO, EXPLICIT, collectives, make_mesh

import jax_fa3

B, T, N, K, H = 4, 16, 8, 4, 16
KINDS = ["one device", "automatic", "argument", "explicit", "manual"]
DISABLED = jax_fa3.DISABLE_JAX_EXPORT_CHECKS


pytestmark = pytest.mark.usefixtures("on_cpu")


def tensors(kind: str, *, head_dim: int = H) -> tuple[Any, Any]:
    """query, key and value on the devices, and their attention."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(B, T, n, head_dim) for n in (N, K, K)]
    arrays = [jax.random.normal(k, s, jnp.float16) for k, s in zip(keys, shapes, strict=True)]
    call = functools.partial(jax_fa3.dot_product_attention, is_causal=True)
    if kind == "one device":
        return arrays, call
    mesh = make_mesh(EXPLICIT if kind == "explicit" else AUTO, x=2, y=2)
    spec = P("x", None, "y")
    where = NamedSharding(mesh, spec)
    if kind == "argument":
        call = functools.partial(call, sharding=where)
    if kind == "manual":
        call = jax.shard_map(call, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
    return [jax.device_put(x, where) for x in arrays], call


def loss(call: Any) -> Any:
    return lambda *qkv: jnp.sin(call(*qkv).astype(jnp.float32)).mean()


@functools.cache
def alone() -> Any:
    arrays, call = tensors("one device")
    return jax.jit(jax.value_and_grad(loss(call), (0, 1, 2)))(*arrays)


def assert_close(found: Any, exact: Any) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4)


def scanned(call: Any) -> Any:
    """Three layers with weights of their own."""

    def layers(query, key, value):
        def layer(x, weight):
            return x + call(x * weight, key, value), None

        return jax.lax.scan(layer, query, jnp.arange(1, 4, dtype=query.dtype) / 4)[0]

    return layers


@pytest.mark.parametrize("kind", KINDS[1:])
def test_scan_over_layers_with_remat(kind):
    def grads(kind):
        arrays, call = tensors(kind)
        layers = scanned(jax.checkpoint(call))
        compiled = jax.jit(jax.value_and_grad(loss(layers), (0, 1, 2))).lower(*arrays).compile()
        return compiled(*arrays), collectives(compiled)

    found, exchanged = grads(kind)
    assert_close(found, grads("one device")[0])
    assert exchanged <= {"all-reduce"}  # the loss


@pytest.mark.parametrize("kind", ["one device", "argument", "explicit", "manual"])
def test_residual_names_save_the_second_forward(kind):
    """The forward kernels in the program for CUDA: without a policy, and with two."""
    arrays, call = tensors(kind, head_dim=64)
    names = jax.checkpoint_policies.save_only_these_names(*jax_fa3.RESIDUAL_NAMES)
    counts = []
    for options in ({}, {"policy": names}, {"policy": jax.checkpoint_policies.everything_saveable}):
        function = jax.value_and_grad(loss(jax.checkpoint(call, **options)), (0, 1, 2))
        counts.append(targets(lower(function, *arrays)).count("jax_fa3.fwd.v1"))
    assert counts == [2, 1, 1]


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
def test_jacrev_and_vmap_of_grad(kind):
    def derivatives(kind):
        arrays, call = tensors(kind)
        means = lambda *x: call(*x).astype(jnp.float32).mean((1, 3))[:2, :2]
        jacobian = jax.jit(jax.jacrev(means))(*arrays)
        stacked = jnp.stack([arrays[0], 2 * arrays[0]])
        grads = jax.jit(jax.vmap(jax.grad(loss(call), (0, 1)), (0, None, None)))
        return jacobian, grads(stacked, *arrays[1:])

    assert_close(derivatives(kind), derivatives("one device"))


@pytest.mark.parametrize("kind", KINDS)
def test_donation(kind):
    """The output may take query's place."""
    arrays, call = tensors(kind)
    exact = np.asarray(jax.jit(call)(*arrays))
    compiled = jax.jit(call, donate_argnums=0).lower(*arrays).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= arrays[0].nbytes // len(arrays[0].sharding.device_set)
    np.testing.assert_array_equal(compiled(*arrays), exact)
    assert arrays[0].is_deleted()


@pytest.mark.parametrize("kind", ["one device", "argument", "explicit", "manual"])
def test_export(kind):
    """Forward and backward, serialised, for CPU and CUDA at once."""
    arrays, call = tensors(kind)
    function = jax.jit(jax.value_and_grad(loss(call), (0, 1, 2)))
    options: Any = {"platforms": ["cpu", "cuda"], "disabled_checks": DISABLED}
    exported = export.deserialize(export.export(function, **options)(*arrays).serialize())
    assert targets(exported.mlir_module())[0] == "jax_fa3.fwd.v1"
    assert_close(jax.jit(exported.call)(*arrays), alone())


@pytest.mark.parametrize("kind", ["one device", "explicit", "manual"])
def test_export_with_symbolic_batch_and_length(kind):
    """Over several devices JAX 0.11 exports such programs but cannot run them, not even a
    shard_map of a sine (refine_polymorphic_shapes fails, or takes the process down)."""
    arrays, call = tensors(kind)
    batch, length = export.symbolic_shape("2*b, t")
    shapes = [
        jax.ShapeDtypeStruct((batch, length, *x.shape[2:]), x.dtype, sharding=x.sharding)
        for x in arrays
    ]
    function = jax.jit(jax.value_and_grad(loss(call), (0, 1, 2)))
    options: Any = {"platforms": ["cpu", "cuda"], "disabled_checks": DISABLED}
    exported = export.deserialize(export.export(function, **options)(*shapes).serialize())
    assert targets(exported.mlir_module())[0] == "jax_fa3.fwd.v1"
    if kind == "one device":
        assert_close(jax.jit(exported.call)(*arrays), alone())


CACHE = """
import jax
jax.config.update("jax_compilation_cache_dir", {directory!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
import test_transforms
for kind in ("one device", "argument", "explicit"):
    arrays, call = test_transforms.tensors(kind)
    lowered = jax.jit(call).lower(*arrays)
    del events[:]
    lowered.compile()
    print(kind, sum(name.endswith("cache_hits") for name in events))
"""


def test_compilation_cache_hits_in_the_next_process(tmp_path):
    tests = Path(__file__).resolve().parent
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, sys.path), str(tests)])
    command = [sys.executable, "-P", "-c", CACHE.format(directory=str(tmp_path))]
    for hits in (0, 1):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines == [f"{k} {hits}" for k in ("one device", "argument", "explicit")]
