"""What users copy runs: the quickstart, and the Python of README.md and of docs/, on any device."""

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = {"usage", "masks", "recipes", "fp8", "flax", "sharding", "context_parallel", "migrating"}


def python_of(page: Path) -> str:
    """Its blocks one after the other, as a reader would type them; but those that need another
    project, which tests/test_integrations_*.py are for."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join(block for block in blocks if not block.startswith("# needs "))


WITH_PYTHON = {page.stem: page for page in PAGES if python_of(page)}


def test_quickstart(capsys):
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"^input +\d+ tokens, \d+ documents", printed, re.MULTILINE)
    assert re.search(r"^ran +(the Hopper kernel|XLA, because .+)$", printed, re.MULTILINE)
    assert re.search(r"^max error +\S+e-\d+ against fp32", printed, re.MULTILINE)


@pytest.mark.parametrize("path", [*(ROOT / "examples").glob("*.py")], ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 200


def test_pages_with_python():
    assert WITH_PYTHON.keys() >= {"README", *GUIDES}


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_of_a_page(name, tmp_path):
    """Each page is complete by itself. What it calls out... is attention over values of 1."""
    code = python_of(WITH_PYTHON[name])
    if "flax" in code:
        pytest.importorskip("flax")
    script = tmp_path / "page.py"
    script.write_text(code, encoding="utf-8")
    names = runpy.run_path(str(script))
    if name == "flax":
        assert names["y"].shape == names["z"].shape == (2, 256, 512)
        assert names["second"].shape == (2, 1, 512)
        return
    if (
        name == "kv_cache"
    ):  # which begin as zeros: 39 and 8 of them, beside a value of 1 with score 8
        weights = [1 / (1 + n * np.exp(-8)) for n in (39, 8)]
        wanted = np.broadcast_to(np.reshape(weights, (2, 1, 1, 1)), names["query"].shape)
        np.testing.assert_allclose(np.asarray(names["out"], np.float32), wanted, atol=0.005)
        return
    results = [x for key, x in names.items() if key.startswith("out")]
    assert results
    for out in results:
        assert out.shape[1:] == names["query"].shape[1:]
        np.testing.assert_allclose(np.asarray(out, np.float32), 1, atol=0.01)


def command(name):
    """README.md's fenced line after its marker, as .ci/run takes it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"<!-- command: {name} -->\n```sh\n(.*?)\n```", readme, re.DOTALL)
    return found


@pytest.mark.parametrize("name", ["quickstart", "tests"])
def test_readme_commands(name):
    """Each is one line of sh that names files which exist."""
    found = command(name)
    assert "\n" not in found
    for file in re.findall(r"examples/\S+", found):
        assert (ROOT / file).is_file()
    if sys.platform != "win32":
        subprocess.run(["sh", "-n", "-c", found], check=True)


def test_the_tests_command_has_workers():
    """By pyproject.toml, which installs what makes them, and nowhere else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "-n 2 --dist worksteal" in project["tool"]["pytest"]["ini_options"]["addopts"]
    assert "pytest-xdist" in project["project"]["optional-dependencies"]["test"]
    assert '".[test]"' in command("tests") and command("tests").endswith(" && .venv/bin/pytest")
    assert not re.search(r"pytest.* -n ", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
