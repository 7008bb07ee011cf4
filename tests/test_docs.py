"""The API page builds without a warning and has every public name."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize(
    "package", ["jax_fa3", "jax_fa3.context_parallel", "jax_fa3.fp8", "jax_fa3.flax"]
)
def test_has_every_public_name(package):
    if package == "jax_fa3.flax":
        pytest.importorskip("flax")
    page = (DOCS / "index.rst").read_text(encoding="utf-8")
    name = (
        rf"^\.\. (?:auto|py:)(?!module).*:: {re.escape(package)}\.(\w+)(?:\.MultiHeadAttention)?$"
    )
    documented = set(re.findall(name, page, re.MULTILINE))
    public = set(importlib.import_module(package).__all__)
    assert documented == public - {"context_parallel"}  # a module, with a section of its own


def test_builds(tmp_path):
    for name in ("sphinx", "flax"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "-q", "-b", "html"]
    subprocess.run([*command, str(DOCS), str(tmp_path / "html")], cwd=tmp_path, check=True)
    page = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    assert "softmax(scale * query key^T) value, exactly" in page
