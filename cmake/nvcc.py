"""Runs nvcc, reports what ptxas says of each kernel, and in strict mode fails on slow code.

    nvcc.py compile [--strict ALLOW_LIST] -- nvcc ... -o OBJECT    (needs -Xptxas=-v)
    nvcc.py summary OBJECT...

`compile` leaves its report as OBJECT.json, `summary` prints the reports of a whole build.
Slow code: spilled registers, and wgmma that ptxas serialises or waits for, as it says in (C7510) and its
neighbours, one for each reason.
"""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

STATISTICS = re.compile(r"ptxas info\s+: [^(]|\s+\d+ bytes stack frame")  # not (C75..), advice
FUNCTION = re.compile(r"(?:Function properties for|Compiling entry function) '?(\w+)")
SPILLS = re.compile(r"(\d+) bytes spill stores")
REGISTERS = re.compile(r"Used (\d+) registers")
SERIALISED = re.compile(r"\(C75\d\d\).*?(?:function '(\w+)'|$)")


def readable(symbol: str) -> str:
    """The symbol demangled, without namespaces, return type and parameters."""
    if shutil.which("c++filt"):
        symbol = subprocess.check_output(["c++filt", "-p", symbol], text=True).strip()
    return re.sub(r"(\b\w+|\(anonymous namespace\))::|^void ", "", symbol)


def parse(log: str) -> dict[str, dict]:
    """What ptxas said, by kernel."""
    kernels: dict[str, dict] = {}

    def kernel(symbol: str) -> dict:
        empty = {"registers": 0, "spilled": 0, "serialised": False}
        return kernels.setdefault(symbol, empty)

    current = "unknown"
    for line in log.splitlines():
        if match := SERIALISED.search(line):
            kernel(match[1] or current)["serialised"] = True
        elif match := FUNCTION.search(line):
            current = match[1]
        elif match := SPILLS.search(line):
            kernel(current)["spilled"] = int(match[1])
        elif match := REGISTERS.search(line):
            kernel(current)["registers"] = int(match[1])
    return {readable(symbol): properties for symbol, properties in kernels.items()}


def faults(kernels: dict[str, dict], allow_list: str) -> list[str]:
    """What strict mode refuses, one line each."""
    lines = [line.partition(" #")[0].strip() for line in allow_list.splitlines()]
    allowed = [line for line in lines if line and not line.startswith("#")]
    found = []
    for name, kernel in kernels.items():
        if any(re.search(pattern, name) for pattern in allowed):
            continue
        if kernel["spilled"]:
            found.append(f"{name} spills {kernel['spilled']} bytes")
        if kernel["serialised"]:
            found.append(f"{name}: ptxas serialises its wgmma (C75..)")
    return found


def compile_one(arguments: list[str]) -> int:
    split = arguments.index("--")
    options, command = arguments[:split], arguments[split + 1 :]
    target = Path(command[command.index("-o") + 1])

    result = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    kernels = parse(result.stdout)
    for line in result.stdout.splitlines():
        if not STATISTICS.match(line):
            print(line)
    if result.returncode != 0:
        return result.returncode

    if options:
        found = faults(kernels, Path(options[1]).read_text())
        for fault in found:
            print(f"error: JAX_FA3_STRICT: {fault}")
        if found:
            target.unlink()
            return 1

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gigabytes": usage.ru_maxrss / 2**20,  # of the largest process
        "kernels": kernels,
    }
    target.with_name(target.name + ".json").write_text(json.dumps(report))
    return 0


def summary(objects: list[str]) -> int:
    reports = {Path(o).name: json.loads(Path(o + ".json").read_text()) for o in objects}
    total = sum(report["cpu_seconds"] for report in reports.values())
    print(f"jax_fa3 kernels: {total:.0f} CPU seconds")
    for name, report in reports.items():
        source = name.removesuffix(".o")
        print(f"  {source}: {report['cpu_seconds']:.0f} s, {report['peak_gigabytes']:.1f} GB")
        for kernel, properties in report["kernels"].items():
            print(
                f"    {kernel}: {properties['registers']} registers, "
                f"{properties['spilled']} bytes spilled"
                + ", wgmma serialised"
                * properties["serialised"]
            )
    return 0


if __name__ == "__main__":
    modes = {"compile": compile_one, "summary": summary}
    sys.exit(modes[sys.argv[1]](sys.argv[2:]))
