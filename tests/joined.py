"""Processes of this machine that jax.distributed joins, started as Slurm would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

PROCESSES = 2


def run_joined(script: Path, *arguments: str, cpu: bool, gpus: int = 0) -> list[str]:
    """What each of the processes prints; each has its share of the GPUs, or CPU devices that it makes
    itself. An error of any is one here."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if cpu:
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    else:  # of the oracles' products, most of the time otherwise
        environment["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
    environment |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost"}
    environment |= {"SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": str(PROCESSES)}
    environment["JAX_COORDINATOR_PORT"] = str(_free_port())
    started = []
    for process in range(PROCESSES):
        own = range(process * gpus // PROCESSES, (process + 1) * gpus // PROCESSES)
        numbers = {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
        if gpus:
            numbers["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, own))
        started.append(
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env=environment | numbers,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        printed = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, err) in zip(started, printed, strict=True):
        assert process.returncode == 0, err
    return [out for out, _ in printed]


def lines_beginning_with(wanted: list[str], out: str) -> list[str]:
    """Gloo prints lines of its own, and two of its threads may mix theirs."""
    return [line for line in out.splitlines() if line.split(" ")[0] in wanted]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
