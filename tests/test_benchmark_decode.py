"""The benchmark of decoding without a GPU: it runs, checks, and prints."""

import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from lowering import hide_gpus

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind an installed jax_fa3

from benchmarks import __main__ as command
from benchmarks import decode, decode_points
from benchmarks.check import WrongResult

SMALL = decode_points.DecodePoint(2, 48, 3, (4, 2), 16, 8, window=20)


def plain(point: decode_points.DecodePoint, inputs: Any, i: int, query: Any, caches: Any) -> Any:
    window = None if point.window is None else (point.window - 1, 0)
    options: Any = {"page_table": inputs.table, "query_starts": inputs.starts, **inputs.options}
    options["local_window_size"] = window
    lengths = inputs.lengths[i]
    return decode.attend(query, *caches, lengths, **options, implementation="xla")


def test_measures_checks_and_prints(tmp_path, capsys, monkeypatch):
    hide_gpus(monkeypatch)
    monkeypatch.setattr(decode, "fa3", plain)
    monkeypatch.setattr(decode, "CONTENDERS", {"fa3": plain, "cudnn": decode.cudnn})
    monkeypatch.setattr(decode, "MOST_CALLS", 3)
    monkeypatch.setattr(decode, "ROTATED_BYTES", 1)
    monkeypatch.setattr(decode, "device_spans", lambda call, rounds: [call.fn(*call.args) and 1.0])
    monkeypatch.setattr(decode, "copied_bytes_per_second", lambda _: 4e12)
    for name in ("environment", "flusher"):
        monkeypatch.setattr(decode, name, dict)
    monkeypatch.setattr(decode, "gpu_state", lambda _: {})
    file = tmp_path / "decode.json"
    decode.main([SMALL], 2, file)
    assert "| 2x48-t3-4/2xd16-pages8-w20 | " in capsys.readouterr().out
    point = json.loads(file.read_text(encoding="utf-8"))["points"][0]
    assert point["error"] < 2**-7 and "cudnn" not in point
    assert command.main(["--suite", "decode", "--table", str(file)]) == 0
    assert capsys.readouterr().out.startswith("A copy moves 4.00 TB/s.")


def test_wrong_results_are_refused(monkeypatch):
    monkeypatch.setattr(decode, "fa3", lambda *x: plain(*x) + jnp.bfloat16(0.1))
    with pytest.raises(WrongResult, match="off by 0.1"):
        decode.check(SMALL, decode.Inputs(SMALL, 1))


def test_a_ragged_call_on_an_e4m3_cache():
    point = decode_points.DecodePoint(
        3, 48, 2, (4, 2), 16, 8, e4m3=True, sinks=True, others=(2, 57, 5)
    )
    assert point.name == "3x48-t2+2x57-t5-4/2xd16-pages8-e4m3-sinks"
    assert point.cache_bytes == 2 * (3 * 48 + 2 * 57) * 2 * 16
    inputs = decode.Inputs(point, 2)
    found = plain(point, inputs, 0, inputs.queries[0], inputs.caches[0])
    assert found.shape == (16, 4, 16) and bool(jnp.isfinite(found).all())


def test_points(capsys):
    assert command.main(["--suite", "decode", "--list", "--points", "64x*"]) == 0
    assert capsys.readouterr().out.split() == [
        "64x4096-t1-32/8xd128-pages64",
        "64x32768-t1-32/8xd128-pages64",
        "64x32768-t1-32/8xd128-pages64-e4m3",
        "64x32768-t1-32/2xd256-pages64",
    ]
    p = decode_points.POINTS[0]
    assert p.cache_bytes == 2 * 2 * 4096 * 8 * 128 and p.flops == 4 * 4096 * 32 * 128


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results = Path(command.__file__).parent / "results" / "decode.json"
    arguments = ["--suite", "decode", "--table", str(results), "--plot", str(tmp_path)]
    assert command.main(arguments) == 0
    assert capsys.readouterr().out.endswith("decode.png\n")
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
