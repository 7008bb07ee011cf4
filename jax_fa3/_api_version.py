"""The versions of XLA's FFI that the kernels were built for and that the installed jaxlib speaks."""

from __future__ import annotations

import pathlib
import re

import jax


def of_runtime() -> tuple[int, int]:
    """Version of the FFI that the installed jaxlib speaks, from its headers."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (
        re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR")
    )
    if major is None or minor is None:
        raise ImportError(f"jax_fa3: no FFI version in the headers of {jax.ffi.include_dir()}")
    return int(major[1]), int(minor[1])


def check(built: tuple[int, int], runtime: tuple[int, int]) -> None:
    """Raises ImportError where XLA would refuse the handlers, and take the process down later."""
    if built[0] != runtime[0] or built[1] > runtime[1]:
        raise ImportError(
            "jax_fa3: its kernels were built for XLA's FFI {}.{}, but this jaxlib speaks {}.{}: "
            "update jax, or reinstall jax_fa3 from source".format(*built, *runtime)
        )
