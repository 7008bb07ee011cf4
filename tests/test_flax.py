"""jax_fa3.flax as a package: optional, and named."""

import subprocess
import sys

import pytest

WITHOUT_FLAX = """
import sys
sys.modules["flax"] = None  # import flax raises ImportError
import jax_fa3
try:
    import jax_fa3.flax
except ImportError as error:
    print(error)
"""


def python(code: str) -> str:
    command = [sys.executable, "-P", "-W", "error", "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_without_flax():
    assert "pip install flax" in python(WITHOUT_FLAX)


def test_import_of_jax_fa3_leaves_flax_alone():
    print_loaded = (
        "import sys, jax_fa3; print('flax' in sys.modules, 'jax_fa3.flax' in sys.modules)"
    )
    assert python(print_loaded).split() == ["False", "False"]


def test_public_names():
    fa3_flax = pytest.importorskip("jax_fa3.flax")
    assert all(hasattr(fa3_flax, name) for name in fa3_flax.__all__)
    assert {name for name in vars(fa3_flax) if not name.startswith("_")} == {*fa3_flax.__all__}
