"""examples/sharded.py: in one process with 8 virtual CPU devices, and in two with 4 each that
jax.distributed joins. It compares with one device itself, and fails where anything is exchanged."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "sharded.py"
WAYS = ["automatic", "sharding=", "explicit", "shard_map"]


@pytest.mark.parametrize("processes", [1, 2])
def test_sharded(processes):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    started = []
    for process in range(processes):
        command = [sys.executable, str(EXAMPLE)]
        if processes > 1:
            if not process:
                address = f"localhost:{_free_port()}"
            command += ["--coordinator", address, "--processes", str(processes)]
            command += ["--process", str(process)]
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        )
    try:
        printed = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (out, err) in zip(started, printed, strict=True):
        assert process.returncode == 0, err
        # Gloo prints lines of its own, and two of its threads may mix theirs.
        wanted = ["devices", "mesh", "ran", *WAYS]
        lines = [line for line in out.splitlines() if line.split(" ")[0] in wanted]
        assert [line.split()[0] for line in lines] == wanted, out
        assert lines[0] == f"devices    8 x cpu, {processes} process(es)"
        assert lines[1] == "mesh       {'data': 2, 'model': 4}"
        for line in lines[3:]:
            assert "(4, 128, 2, 64) of (8, 128, 8, 64); exchanged: nothing; max error" in line


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
