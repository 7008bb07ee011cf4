"""Several processes, on CPU devices: examples/sharded.py, which compares with one device itself and
fails where anything is exchanged, and context parallelism."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from joined import lines_beginning_with, run_joined

TESTS = Path(__file__).resolve().parent
EXAMPLE = TESTS.parent / "examples" / "sharded.py"
WAYS = ["automatic", "sharding=", "explicit", "shard_map"]


def alone(script: Path) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [done.stdout]


@pytest.mark.parametrize("processes", [1, 2])
def test_sharded(processes):
    if processes == 1:
        printed = alone(EXAMPLE)
    else:
        printed = run_joined(EXAMPLE, "--cluster", "--processes", "2", cpu=True)
    for out in printed:
        wanted = ["devices", "mesh", "ran", *WAYS]
        lines = lines_beginning_with(wanted, out)
        assert [line.split()[0] for line in lines] == wanted, out
        assert lines[0] == f"devices    8 x cpu, {processes} process(es)"
        assert lines[1] == "mesh       {'data': 2, 'model': 4}"
        for line in lines[3:]:
            assert "(4, 128, 2, 64) of (8, 128, 8, 64); exchanged: nothing; max error" in line


def test_context_parallel():
    """One sequence over the devices of both processes."""
    for out in run_joined(TESTS / "split_sequences.py", "xla", cpu=True):
        assert len(lines_beginning_with(["right:"], out)) == 3, out
