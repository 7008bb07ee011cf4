"""What users copy runs: the quickstart and the README's Python, on any device."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_quickstart(capsys):
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"^input +\d+ tokens, \d+ documents", printed, re.MULTILINE)
    assert re.search(r"^ran +(the Hopper kernel|XLA, because .+)$", printed, re.MULTILINE)
    assert re.search(r"^max error +\S+e-\d+ against fp32", printed, re.MULTILINE)


@pytest.mark.parametrize("path", [*(ROOT / "examples").glob("*.py")], ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 200


def test_readme_python(tmp_path):
    """The blocks one after the other, as a reader would type them."""
    pytest.importorskip("flax")
    blocks = re.findall(r"^```python\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    names = runpy.run_path(str(script))
    assert names["out"].shape == names["query"].shape
    assert names["y"].shape == (2, 256, 512)


@pytest.mark.parametrize("name", ["quickstart", "tests"])
def test_readme_commands(name):
    """CI takes its command from here; each is one line of sh that names files which exist."""
    found = re.findall(rf"<!-- command: {name} -->\n```sh\n(.*?)\n```", readme(), re.DOTALL)
    assert len(found) == 1
    assert "\n" not in found[0]
    for file in re.findall(r"examples/\S+", found[0]):
        assert (ROOT / file).is_file()
    if sys.platform != "win32":
        subprocess.run(["sh", "-n", "-c", found[0]], check=True)
