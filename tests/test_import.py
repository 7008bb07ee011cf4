"""What `import jax_fa3` offers, costs and leaves alone."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import jax.export

import jax_fa3


def python(code: str) -> str:
    """-P: not the checkout's jax_fa3/, which has no compiled module. The first of several
    runs may have to write bytecode."""
    command = [sys.executable, "-P", "-W", "error", "-c", code]
    env = {name: x for name, x in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout


def test_public_names():
    assert all(hasattr(jax_fa3, name) for name in jax_fa3.__all__)
    public = {name for name in vars(jax_fa3) if not name.startswith("_")}
    assert public <= {*jax_fa3.__all__, "flax", "fp8", "integrations", "kv_cache"}


def test_version():
    try:
        assert importlib.metadata.version("jax_fa3") == jax_fa3.__version__
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        assert jax_fa3.__version__.count(".") == 2


def test_is_typed():
    assert (pathlib.Path(jax_fa3.__file__).parent / "py.typed").exists()


def test_export_checks_name_the_targets():
    checks = [jax.export.DisabledSafetyCheck.custom_call(x) for x in jax_fa3._targets.TARGETS]
    assert list(jax_fa3.DISABLE_JAX_EXPORT_CHECKS) == checks and len(checks) == 11


def test_import_initialises_no_backend_and_is_quick():
    """At most 100 ms over `import jax`, of this process: an editable install asks ninja besides."""
    code = """
import time, jax
from jax._src import xla_bridge
start = time.process_time()
import jax_fa3
print(time.process_time() - start)
assert not xla_bridge.backends_are_initialized()
"""
    assert min(float(python(code)) for _ in range(3)) < 0.1


def test_imports_no_other_project():
    """Neither does the package of the adapters: each of its modules imports its own project."""
    code = """
import sys, jax
before = set(sys.modules)
import jax_fa3, jax_fa3.integrations
print(*sorted({name.partition(".")[0] for name in sys.modules.keys() - before}))
assert not [name for name in sys.modules if name.startswith("jax_fa3.integrations.")]
"""
    found = set(python(code).split()) - set(sys.stdlib_module_names)
    assert found <= {"jax_fa3", "jax", "jaxlib", "numpy"}
