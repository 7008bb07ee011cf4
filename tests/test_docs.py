"""The documentation: the site builds without a warning and has every public name, links lead to
something, README.md is short."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MARKDOWN = [
    *ROOT.glob("*.md"),
    *DOCS.rglob("*.md"),
    *(ROOT / folder / "README.md" for folder in ("cpp", "release")),
]


@pytest.mark.parametrize(
    "package",
    ["jax_fa3", "jax_fa3.context_parallel", "jax_fa3.fp8", "jax_fa3.kv_cache", "jax_fa3.flax"],
)
def test_has_every_public_name(package):
    if package == "jax_fa3.flax":
        pytest.importorskip("flax")
    page = (DOCS / "api.rst").read_text(encoding="utf-8")
    name = (
        rf"^\.\. (?:auto|py:)(?!module).*:: {re.escape(package)}\.(\w+)(?:\.MultiHeadAttention)?$"
    )
    documented = set(re.findall(name, page, re.MULTILINE))
    public = set(importlib.import_module(package).__all__)
    assert documented == public - {"context_parallel"}  # a module, with a section of its own


def test_builds(tmp_path):
    for name in ("sphinx", "myst_parser", "flax"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "-q", "-b", "html"]
    subprocess.run([*command, str(DOCS), str(tmp_path / "html")], cwd=tmp_path, check=True)
    for page, text in {
        "api": "softmax(scale * query key^T) value, exactly",
        "limits": "compute capability 9.0",  # README.md's table
        "kernels": "One tile",  # cpp/README.md
        "kernel_notes/backward": "Deterministic mode",
    }.items():
        assert text in (tmp_path / "html" / f"{page}.html").read_text(encoding="utf-8")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """Relative links lead to files that exist, and to headings that they have."""
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_file(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link
