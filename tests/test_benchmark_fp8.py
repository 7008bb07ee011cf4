"""The FP8 benchmarks without a GPU: what they call, whom they believe, what they print."""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from lowering import hide_gpus, lower, operations, targets

from jax_fa3 import fp8 as library

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind an installed jax_fa3

from benchmarks import contenders, fp8, fp8_error, fp8_inputs, plot, report, run, timing
from benchmarks.check import WrongResult
from benchmarks.points import point
from benchmarks.suites import select

cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")

NAMES = {"contenders": ("fa3 fp8", fp8.TRANSPOSED, "cudnn fp8", "fa3"), "baseline": "cudnn fp8"}
SMALL = point("fp8", 64, 256, heads=(4, 2), batch=2, is_causal=True, pass_name="fp8", **NAMES)
PREPARE = point(
    "fp8",
    64,
    192,
    heads=(4, 2),
    batch=2,
    pass_name="prepare",
    contenders=("fa3 fp8", fp8.MEANS, "copy"),
    baseline="copy",
)


@pytest.fixture
def on_xla(monkeypatch):
    """The calls as they are made on a GPU, but for who runs them."""
    for module, name in (
        (library, "quantize"),
        (library, "quantized_dot_product_attention"),
        (contenders.jax_fa3, "dot_product_attention"),
    ):
        plain = getattr(module, name)

        def run_in_xla(*args, plain=plain, **options):
            return plain(*args, **(options | {"implementation": "xla"}))

        monkeypatch.setattr(module, name, run_in_xla)


def cudnn_in_numpy(query, key, value, *, scale, mask_type, use_fp8, fp8_params):
    """What cuDNN's arguments mean: descale is multiplied with what is read, scale with what is written."""
    assert use_fp8 and all(x.shape == (1, 1, 1, 1) for x in fp8_params.values())
    cudnn.check_fp8_params(fp8_params)
    tensors = zip((query, key, value), "qkv", strict=True)
    query, key, value = (
        x.astype(jnp.float32) * fp8_params[f"descale_{name}"] for x, name in tensors
    )
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * scale
    if mask_type == cudnn.MaskType.CAUSAL:
        scores = jnp.where(jnp.tri(query.shape[1], dtype=bool), scores, -jnp.inf)
    weights = (jax.nn.softmax(scores, axis=-1) * fp8_params["scale_s"]).astype(fp8.E4M3)
    weights = weights.astype(jnp.float32) * fp8_params["descale_s"]
    out = jnp.einsum("bnts,bsnh->btnh", weights, value) * fp8_params["scale_o"]
    return out.astype(fp8.E4M3), None, None


def test_everybody_computes_the_same_and_is_checked(on_xla, monkeypatch):
    monkeypatch.setattr(cudnn, "dot_product_attention", cudnn_in_numpy)
    calls, records = run.prepare(SMALL)
    assert list(calls) == ["fa3 fp8", "fa3 fp8, transposed", "cudnn fp8", "fa3"]
    assert all(0 < record["error_share"] < 1 for record in records.values())
    assert calls["fa3 fp8"]().dtype == jnp.bfloat16 and calls["cudnn fp8"]().dtype == fp8.E4M3

    inputs = contenders.PASSES["fp8"].inputs(SMALL)
    out = calls["fa3 fp8"]()
    assert jnp.array_equal(out, calls[fp8.TRANSPOSED]())
    fp8.check_forward(SMALL, inputs, out)
    wrong = out * 1.25, out.at[0, 0, 0, 0].set(jnp.nan), jnp.roll(out, 1, axis=1)
    for x in (*wrong, (calls["cudnn fp8"]().astype(jnp.float32) * 1.25).astype(fp8.E4M3)):
        with pytest.raises(WrongResult, match=SMALL.name):
            fp8.check_forward(SMALL, inputs, x)


def test_cudnn_custom_call(monkeypatch):
    """JAX's own checks take the arguments, and nothing but the custom call touches the tensors."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    for is_causal, mask in ((False, "NO_MASK"), (True, "CAUSAL")):
        p = dataclasses.replace(SMALL, is_causal=is_causal, num_heads_q=2)
        inputs = contenders.PASSES["fp8"].inputs(p)
        call = fp8.CONTENDERS["cudnn fp8"](p, inputs)
        text = call.fn.trace(*call.args).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__cudnn$fmhaSoftmaxF8") == 1 and f"mask_type\\22: \\22{mask}" in text
        assert "convert" not in text


# Of empty operands, and of the 64 signs.
NO_WORK = {"broadcast_in_dim", "reshape"}


def test_kernels_are_what_is_timed(monkeypatch):
    """Nothing beside them in the calls; and no variant of the error table goes to XLA."""
    hide_gpus(monkeypatch)
    inputs = contenders.PASSES["fp8"].inputs(SMALL)
    for name in ("fa3 fp8", fp8.TRANSPOSED):
        call = fp8.CONTENDERS[name](SMALL, inputs)
        text = lower(call.fn, *call.args)
        assert targets(text) == ["jax_fa3.fwd_fp8.v1"]
        assert operations(text) - NO_WORK == {"custom_call"}
    inputs = contenders.PASSES["prepare"].inputs(PREPARE)
    call = fp8.preparation(PREPARE, "fa3 fp8", inputs)
    text = lower(call.fn, *call.args)
    assert targets(text) == ["jax_fa3.quantize.v1"] * 3
    assert operations(text) - NO_WORK == {"custom_call"}
    qkv = fp8_inputs.draw(0, "outliers", 128, 128, 1, 64)
    for name, (_, variant) in fp8_error.VARIANTS.items():
        last = targets(lower(partial(variant, implementation="fa3"), *qkv))[-1:]
        wanted = {"fp16": ["jax_fa3.fwd.v1"], "fp16, standard attention": []}
        assert last == wanted.get(name, ["jax_fa3.fwd_fp8.v1"])


def test_wrong_results_of_ours_stop_the_benchmark(on_xla, monkeypatch):
    def without_scales(query, key, value, *scales, **options):
        return query.astype(options["dtype"])

    monkeypatch.setattr(library, "quantized_dot_product_attention", without_scales)
    with pytest.raises(WrongResult, match=SMALL.name):
        run.prepare(SMALL)


def test_preparation_is_checked(on_xla, monkeypatch):
    calls, records = run.prepare(PREPARE)
    for name in ("fa3 fp8", fp8.MEANS):
        assert 0 < records[name]["error_share"] <= 1
    numbers = 2 * 192 * (4 + 2 + 2) * 64
    assert PREPARE.moved_bytes() == 3 * numbers and PREPARE.flops() == 0
    assert calls["copy"].args[0].nbytes * 2 == PREPARE.moved_bytes()

    inputs = contenders.PASSES["prepare"].inputs(PREPARE)
    query, key, value = results = calls["fa3 fp8"]()
    fp8.check_preparation(PREPARE, inputs, results)
    untransformed = library.quantize(inputs[1])
    one_scale = library.quantize(inputs[2], quantization="tensor")
    for wrong in (
        (query, untransformed, value),
        (query, key, one_scale),
        (query, key, (value[0], value[1] * 1.01)),
        (query, (jnp.roll(key[0], 1, axis=1), key[1]), value),
    ):
        with pytest.raises(WrongResult, match="quantized wrongly"):
            fp8.check_preparation(PREPARE, inputs, wrong)


def test_points():
    points = select(["fp8"])
    assert len([p for p in points if p.pass_name == "fp8"]) == 36
    assert len([p for p in points if p.pass_name == "prepare"]) == 18
    assert points[0].name == "fp8-d64-full-s512"
    assert points[0].flops() == select(["paper"])[0].flops()


def fake_report():
    points = []
    for p in (SMALL, dataclasses.replace(SMALL, is_causal=False), PREPARE):
        p = dataclasses.replace(p, seqlen=256)
        times = {name: [0.5 + 0.1 * i] * 3 for i, name in enumerate(p.contenders)}
        back = {name: timing.Timing(0.5, ("kernel",)) for name in times}
        records = {name: {"error_share": 0.5} for name in times}
        points.append(run.summarise(p, times, back, records, None))
    environment = {"gpu": "NVIDIA H200", "date": "2026-11-21", "versions": {}}
    return {"environment": environment, "points": points, "rounds": 3, "wall_s": 1.0}


def test_tables_and_plot(tmp_path):
    made = json.loads(json.dumps(fake_report()))
    text = report.markdown(made)
    assert "| FP8 forward, head dim 64, causal | 0 (1.40; 1.60; 1.17) |" in text
    speed = PREPARE.moved_bytes() * 256 / 192 / 0.5e6
    assert f"| preparation, head dim 64, GB/s | {speed:.0f} (1.40; 1.17) |" in text
    assert "| its time of the attention's, head dim 64, full / causal | 100% / 100% |" in text
    assert f"{speed:.0f} GB/s 1.40x" in report.line(made["points"][2], PREPARE.contenders)

    refused = made["points"][0]["results"]
    refused["cudnn fp8"], refused["fa3 fp8"]["ratio"] = {"refused": "no"}, None
    assert "causal | 0 (–; 1.60; 1.17) |" in report.markdown(made)

    page = tmp_path / "benchmarks.md"
    sections = [
        f"{begin}\n{end}\n" for begin, end in map(report.markers, ("benchmark", "benchmark-fp8"))
    ]
    page.write_text("".join(sections), encoding="utf-8")
    report.write_page(page, made)
    written = page.read_text(encoding="utf-8")
    assert written.startswith(sections[0]) and report.markdown(made) in written

    pytest.importorskip("matplotlib")
    written = plot.plot(made, tmp_path)
    assert [path.name for path in written] == ["fp8_forward.png"]
