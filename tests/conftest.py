"""Set up before jax is imported: 8 CPU devices, and programs that compile fast."""

import gc
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from zlib import crc32

import pytest

_ON_CPU = shutil.which("nvidia-smi") is None  # where tests compile far longer than they run
_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_gpu_autotune_level=0"]
if _ON_CPU:
    _FLAGS.append("--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")])  # the last one wins
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes, one GPU
_tests = Path(__file__).resolve().parent
# `python -m pytest` puts the checkout first on the path, where jax_fa3/ lies without its compiled
# module: an installed jax_fa3 goes before it. Tests import cases and helpers.
_root = str(_tests.parent)
sys.path[:] = [entry for entry in sys.path if entry not in ("", _root)] + [_root, str(_tests)]


def pytest_configure(config: pytest.Config) -> None:
    """A program that several tests jit anew is compiled once. Each process keeps its own, for one run:
    jax writes entries in place, where another could read half of one. Before the first program, as jax
    asks only then whether there is a cache."""
    if not _ON_CPU or (config.getoption("numprocesses", None) and not _is_worker(config)):
        return
    import jax

    folder = tempfile.TemporaryDirectory(prefix="jax_fa3-")
    config.add_cleanup(folder.cleanup)
    jax.config.update("jax_compilation_cache_dir", folder.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # quicker ones are no gain
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-in",
        type=int,
        default=1,
        metavar="N",
        help="of a test's cases, where they are more than two, the first and about one in N",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    one_in = config.getoption("one_in") or 1
    cases = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    left_out: set[pytest.Item] = set()
    for every in cases.values():
        if len(every) > 2:
            # By a hash: each n-th might have one value of the innermost parameter alone.
            left_out |= {x for x in every[1:] if crc32(x.nodeid.encode()) % one_in}
    if left_out:
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests of the adapters measured, where they ran in this process."""
    measured = getattr(sys.modules.get("integrations"), "MEASURED", {})
    for file, found in measured.items():
        terminalreporter.write_line(f"{file}: {found}")


@pytest.fixture(scope="session")
def hopper(pytestconfig: pytest.Config):
    """A Hopper GPU, or the test is skipped. Keeps compiled programs from one run to the next."""
    import jax

    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        devices = []
    found = [device for device in devices if device.compute_capability == "9.0"]
    if not found:
        pytest.skip("needs a Hopper GPU (sm_90)")
    cache = pytestconfig.cache
    if cache is not None:  # None under -p no:cacheprovider
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
    return found[0]


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of one file go before the next: each takes some of the memory maps of the
    process, of which Linux allows 65,530, and past them XLA crashes."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    """As on a machine without GPUs, also where there are some."""
    import jax
    from lowering import hide_gpus

    hide_gpus(monkeypatch)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest):
    """Tests marked gpu skip themselves where there is none."""
    if request.node.get_closest_marker("gpu"):
        request.getfixturevalue("hopper")
