"""Two processes of jax.distributed on one machine, each with half of its GPUs (two or four)."""

from pathlib import Path

import jax
import pytest
from joined import PROCESSES, lines_beginning_with, run_joined

pytestmark = pytest.mark.gpu
TESTS = Path(__file__).resolve().parent


@pytest.fixture
def gpus(hopper) -> int:
    if jax.device_count() < PROCESSES:
        pytest.skip("needs two GPUs")
    return 4 if jax.device_count() >= 4 else 2


def test_context_parallel(gpus: int):
    for out in run_joined(TESTS / "split_sequences.py", "fa3", cpu=False, gpus=gpus):
        assert len(lines_beginning_with(["right:"], out)) == 2 * 3, out


def test_sharded_example(gpus: int):
    example = TESTS.parent / "examples" / "sharded.py"
    for out in run_joined(example, "--cluster", cpu=False, gpus=gpus):
        (devices,) = lines_beginning_with(["devices"], out)
        assert devices.startswith(f"devices    {gpus} x ") and "2 process(es)" in devices
        assert lines_beginning_with(["ran"], out) == ["ran        the Hopper kernels"]
