"""For tests of projects that are on no package index in a version that has their hook: the project itself
where it is installed, else a stand-in for its interface, written after its sources."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def installed(project: str, modules: dict[str, Callable[[], dict[str, Any]]]) -> Iterator[None]:
    """The project itself, or its stand-in for as long."""
    if importlib.util.find_spec(project) is not None:
        yield
        return
    names = {
        ".".join(name.split(".")[:i]) for name in modules for i in range(1, name.count(".") + 2)
    }
    made = {name: ModuleType(name) for name in names}
    for module in made.values():
        module.__path__ = []
    sys.modules |= made
    try:
        for name, contents in modules.items():
            vars(made[name]).update(contents())
        yield
    finally:
        for name in made:
            del sys.modules[name]
