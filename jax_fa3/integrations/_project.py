"""What the adapters share: versions of a project that were tried, and refusals."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
import warnings
from typing import Any


@functools.cache
def check_version(distribution: str, oldest: str, newest: str) -> None:
    """Warns, once, where a project is of a version that the adapter was not tried with, or of none, as a
    checkout that was not installed is."""
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        found = "of no known version"
    if not _numbers(oldest) <= _numbers(found) <= _numbers(newest):
        tried = oldest if oldest == newest else f"{oldest} to {newest}"
        text = f"jax_fa3.integrations: got {distribution} {found}, was tried with {tried}"
        warnings.warn(text, stacklevel=3)


def _numbers(version: str) -> tuple[int, ...]:
    """Of the first three parts, so that 0.2.227.dev4 is 0.2.227."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def hook(module: str, name: str) -> Any:
    """module.name, for projects whose released versions do not have it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ModuleNotFoundError) as error:
        project = module.partition(".")[0]
        if getattr(error, "name", None) == project:
            raise
        wanted = f"its sources, which have {module}.{name}"
        raise ImportError(f"{project}: got a version without the hook, wanted {wanted}") from error


def refuse(name: str, found: object, wanted: str) -> NotImplementedError:
    return NotImplementedError(f"{name}: got {found}, wanted {wanted}")


def refuse_given(**arguments: Any) -> None:
    """Raises for each argument that is not None, 0 or False."""
    for name, x in arguments.items():
        if not (x is None or (isinstance(x, (bool, int, float)) and not x)):
            found = type(x).__name__ if hasattr(x, "shape") else repr(x)
            raise refuse(name, found, "its default: jax_fa3's adapter does not take it")
