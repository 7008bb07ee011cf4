"""The compiled module: what it links, for which GPU it holds code."""

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

C = pytest.importorskip("jax_fa3._C", reason="Python-only install", exc_type=ModuleNotFoundError)


def tool_output(name, *arguments):
    """Standard output of a tool from PATH or from NVIDIA's wheel; skips where there is none."""
    tool = shutil.which(name)
    if tool is None:
        try:
            wheel = metadata.distribution(f"nvidia-cuda-{name}")
        except metadata.PackageNotFoundError:
            pytest.skip(f"no {name} here")
        tool = str(wheel.locate_file(f"nvidia/cu13/bin/{name}"))
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def test_ffi_api_is_the_oldest_supported():
    # jaxlib 0.10 has 0.3, and a jaxlib refuses handlers that are newer than itself.
    assert C.ffi_api_version() == (0, 3)


def test_links_no_cuda_library():
    needed = re.findall(r"NEEDED.*\[(.*)\]", tool_output("readelf", "-d", C.__file__))
    assert needed
    assert not [library for library in needed if "cuda" in library]


def test_machine_code_is_sm_90a_alone():
    if not C.kernels():
        pytest.skip("built without kernels")
    cubins = tool_output("cuobjdump", "--list-elf", C.__file__).splitlines()
    assert cubins
    assert all(cubin.endswith(".sm_90a.cubin") for cubin in cubins)
    # No PTX: nothing is compiled when it is loaded.
    assert "PTX file" not in tool_output("cuobjdump", "--list-ptx", C.__file__)


def test_binary_is_small():
    assert Path(C.__file__).stat().st_size <= 60e6  # the wheel, compressed, has 30 MB
