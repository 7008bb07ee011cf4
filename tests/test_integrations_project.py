"""What the adapters share. The projects themselves need not be installed."""

import importlib.metadata
import re
import warnings
from pathlib import Path

import pytest

from jax_fa3.integrations import _project


@pytest.fixture(autouse=True)
def _forget():
    _project.check_version.cache_clear()
    yield
    _project.check_version.cache_clear()


@pytest.mark.parametrize("version", ["0.2", "0.2.5.dev3", "0.3.9", "0.10.0rc1"])
def test_versions_that_were_tried(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    _project.check_version("some-project", "0.2", "0.10.0")


@pytest.mark.parametrize("version", ["0.1.9", "0.10.1", "1.0"])
def test_others_warn_once_by_name(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    message = f"got some-project {version}, was tried with 0.2 to 0.10.0"
    with pytest.warns(UserWarning, match=message):
        _project.check_version("some-project", "0.2", "0.10.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _project.check_version("some-project", "0.2", "0.10.0")


def test_a_checkout_warns_as_well():
    with pytest.warns(
        UserWarning, match="got no-such-project of no known version, was tried with 1.0"
    ):
        _project.check_version("no-such-project", "1.0", "1.0")


def test_versions_tried_are_those_that_the_docs_name():
    """The newest that each adapter does not warn of."""
    tried = {
        file.stem: match[1]
        for file in Path(_project.__file__).parent.glob("*.py")
        if (
            match := re.search(r'check_version\("[\w-]+", "[\d.]+", "([\d.]+)"\)', file.read_text())
        )
    }
    page = Path(__file__).resolve().parent.parent / "docs" / "integrations.md"
    named = re.findall(r"^\| (\w+) ([\d.]+) \(jax ", page.read_text("utf-8"), re.MULTILINE)
    assert tried == {name.lower(): version for name, version in named if name != "Flax"}


def test_refusals_are_of_what_was_given():
    _project.refuse_given(bias=None, dropout=0.0, sinks=False)
    with pytest.raises(NotImplementedError, match="dropout: got 0.1, wanted its default"):
        _project.refuse_given(bias=None, dropout=0.1)


def test_versions_without_the_hook_say_so():
    message = "json: got a version without the hook, wanted its sources, which have json.{}"
    with pytest.raises(ImportError, match=message.format("decoder.register")):
        _project.hook("json.decoder", "register")
    with pytest.raises(ImportError, match=message.format("kernels.register")):
        _project.hook("json.kernels", "register")
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_project'"):
        _project.hook("no_such_project.kernels", "register")
    assert _project.hook("json.decoder", "JSONDecoder").__name__ == "JSONDecoder"
