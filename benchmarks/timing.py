"""Device time in rounds, and what the GPU was doing meanwhile."""

import csv
import gzip
import importlib.metadata
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PAUSE_S = 1e-3
FLUSH_BYTES = 256 * 2**20  # several times Hopper's 50 to 60 MB of L2
MATMUL_SIZE = 8192


class Call(NamedTuple):
    """A compiled function and its arguments, ready to be timed."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]

    def __call__(self) -> Any:
        return jax.block_until_ready(self.fn(*self.args))


class Timing(NamedTuple):
    """One timed call: device milliseconds, all of its kernels added up, and their names.

    CUPTI's kernel records are what is added up: launch gaps and memsets are left out, for everyone.
    """

    ms: float
    kernels: tuple[str, ...]


def kernel_records(call: Call, repeats: int = 1) -> list[tuple[str, float]]:
    """Names and milliseconds of all kernels, of all GPUs, in `repeats` calls launched one after the
    other.

    This is what `jax.experimental.mosaic.gpu.profiler.measure` does, without the call that it makes
    to warm up: directly before the timed one, that call would fill the L2 again.
    """
    # Private, as what it stands in for is; imported here, for without CUDA it does not exist.
    from jax._src.lib.mosaic_gpu import _mosaic_gpu_ext as cupti  # pyright: ignore

    cupti._cupti_init()
    try:
        jax.block_until_ready([call.fn(*call.args) for _ in range(repeats)])
    finally:
        # Without detaching CUPTI, which takes 20 ms.
        records = cupti._cupti_get_timings(False)
    if not records:
        raise RuntimeError("CUPTI recorded no kernel: is another profiler attached?")
    return list(records)


def device_time(call: Call, repeats: int = 1) -> Timing:
    """Times `repeats` calls, launched one after the other; the mean of one call is returned."""
    records = kernel_records(call, repeats)
    names = tuple(name for name, _ in records[: len(records) // repeats])
    return Timing(sum(ms for _, ms in records) / repeats, names)


def device_spans(call: Call, repeats: int) -> list[float]:
    """Milliseconds on the GPU's timeline from the start of a call's first kernel to the end of its
    last one, of `repeats` calls: gaps between kernels count, the launch by the host does not."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                call()
        files = Path(folder).rglob("*.trace.json.gz")
        events = [
            e
            for file in files
            for e in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        ]
    named = [e for e in events if e.get("ph") == "M" and "name" in e.get("args", {})]
    processes = {e["pid"]: e["args"]["name"] for e in named if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in named if e["name"] == "thread_name"}
    kernels = sorted(
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("ph") == "X"
        and "GPU" in processes.get(e["pid"], "")
        and "Stream" in threads.get((e["pid"], e["tid"]), "")
    )
    each, rest = divmod(len(kernels), repeats)
    if rest or not each:
        raise RuntimeError(f"the profiler recorded {len(kernels)} kernels of {repeats} equal calls")
    calls = (kernels[i * each : (i + 1) * each] for i in range(repeats))
    return [(max(stop for _, stop in x) - x[0][0]) / 1e3 for x in calls]


def flusher() -> Callable[[], None]:
    """A function that empties the L2 by reading something else, then lets the GPU rest a moment."""
    ballast = jnp.ones(FLUSH_BYTES // 4, jnp.float32)
    total = jax.jit(jnp.sum)

    def flush() -> None:
        total(ballast).block_until_ready()
        time.sleep(PAUSE_S)

    flush()
    return flush


def in_rounds(
    calls: Mapping[str, Any],
    rounds: int,
    between: Callable[[], None],
    timer: Callable[[Any], Timing] = device_time,
) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round: one call of each in turn, starting with another
    one each time so that nobody always runs behind the same neighbour."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            between()
            times[name].append(timer(calls[name]).ms)
    return times


def ratio(baseline: Sequence[float], contender: Sequence[float]) -> float:
    """How many times faster than the baseline: the median over rounds of the rounds' ratios."""
    return statistics.median(b / c for b, c in zip(baseline, contender, strict=True))


def _nvidia_smi(*fields: str) -> "subprocess.Popen[str] | None":
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
        "-i",
        "0",
    ]
    try:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except FileNotFoundError:
        return None


def _answer(query: "subprocess.Popen[str] | None", fields: Sequence[str]) -> dict[str, str]:
    if query is None:
        return {}
    rows = list(csv.reader(query.communicate(timeout=30)[0].splitlines(), skipinitialspace=True))
    return dict(zip(fields, rows[0], strict=False)) if rows else {}


def matmul_call() -> Call:
    """A bf16 8192^3 matmul, compiled and run once."""
    n = MATMUL_SIZE
    x, y = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    # cuBLAS it shall be: searching Triton's tilings would take longer than all the rest.
    options = {"xla_gpu_enable_triton_gemm": False}
    matmul = Call(jax.jit(jnp.matmul, compiler_options=options), (x, y))
    matmul()
    return matmul


def matmul_tflops(ms: float) -> float:
    return 2 * MATMUL_SIZE**3 / ms / 1e9


def gpu_state(between: Callable[[], None]) -> dict[str, Any]:
    """A bf16 8192^3 matmul in TFLOP/s, and SM clock (MHz), power (W) and temperature (C) of the first
    GPU that nvidia-smi lists, asked for while it multiplies matrices."""
    matmul = matmul_call()
    times = in_rounds({"matmul": matmul}, 5, between)["matmul"]

    fields = ("clocks.sm", "power.draw", "temperature.gpu")
    query = _nvidia_smi(*fields)
    deadline = time.monotonic() + 5
    while query is not None and query.poll() is None and time.monotonic() < deadline:
        jax.block_until_ready([matmul.fn(*matmul.args) for _ in range(20)])
    smi = _answer(query, fields)
    return {"matmul_tflops": matmul_tflops(statistics.median(times)), **smi}


def environment() -> dict[str, Any]:
    """What ran: GPU, driver, versions."""
    device = jax.devices()[0]
    packages = (
        "jax",
        "jaxlib",
        "nvidia-cudnn-cu13",
        "nvidia-cudnn-cu12",
        "flash-attn3-jax",
        "dew-flash-attn-cu13",
        "dew-flash-attn-cu12",
        "jax_fa3",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    fields = ("driver_version", "power.limit")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "versions": versions,
        **_answer(_nvidia_smi(*fields), fields),
    }
