"""examples/train_transformer.py, small: it trains, resumes, writes, and spares what is there."""

import functools
import importlib
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from lowering import hide_gpus, lower, targets

for name in ("flax", "optax", "orbax.checkpoint"):
    pytest.importorskip(name)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("train_transformer")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def run(example, monkeypatch, capsys):
    """What it prints, with these arguments."""

    def run(*arguments):
        argv = ["train_transformer.py", "--size", "tiny", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        example.main()
        return capsys.readouterr().out

    return run


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_trains_resumes_and_refuses(run, example, tmp_path, capsys):
    directory = tmp_path / "run"
    printed = run("--steps", 2, "--checkpoint", directory)
    assert re.search(r"^\[#{20}\] step +2  loss \d\.\d+  [\d,]+ tokens/s", printed, re.MULTILINE)
    assert re.search(r"^text +[\d,]+ tokens, \d{3} documents$", printed, re.MULTILINE)
    assert [path.name for path in directory.iterdir()] == ["2"]
    assert printed.count("The default") == 1 and len(printed.split("The default")[1]) > 60

    before = contents(directory)
    with pytest.raises(SystemExit):
        run("--steps", 3, "--checkpoint", directory)
    assert f"--checkpoint {directory} is not empty: add --resume" in capsys.readouterr().err
    assert contents(directory) == before

    printed = run("--steps", 3, "--checkpoint", directory, "--resume")
    assert f"resumed    {directory / '2'}" in printed
    assert re.search(r"^compiled +loss \d\.\d+", printed, re.MULTILINE)
    assert {path.name for path in directory.iterdir()} == {"2", "3"}
    # As if it had never stopped.
    config = example.dataclasses.replace(example.SIZES["tiny"], steps=3)
    straight, _ = example.train(config, example.initialize(config), example.Text(config), 1)
    with example.ocp.StandardCheckpointer() as checkpointer:
        resumed = example.resume(checkpointer, directory, straight)
    assert int(resumed["step"]) == 3
    for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(straight), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)

    for file in (directory / "3").rglob("*"):
        if file.is_file():
            file.write_bytes(b"garbage")
    before = contents(directory)
    with pytest.raises(SystemExit, match=re.escape(f"--resume: {directory / '3'} is corrupt")):
        run("--steps", 3, "--checkpoint", directory, "--resume")
    assert contents(directory) == before


def test_plot(example, tmp_path):
    pytest.importorskip("matplotlib")
    example.plot([3.0, 2.0, 1.0], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_refuses_a_missing_checkpoint(run, tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(SystemExit, match=re.escape(f"--resume: got {missing}, which has no")):
        run("--checkpoint", missing, "--resume")
    assert not missing.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--implementation", "cudnn"], "cudnn has no mask for packed documents: add --plain"),
        (["--resume"], "--resume needs --checkpoint DIR"),
    ],
)
def test_refuses_at_once(run, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_text(example):
    """Every piece of it comes back, in the vocabulary or as bytes."""
    text = example.Text(example.SIZES["small"])
    for sample in ("The default is Ω,\n  or  xyzzyplugh.", "", "def f(x): ..."):
        assert text.decode(text.encode(sample)) == sample
    tokens, documents = text.batch(example.SIZES["small"], 0)
    assert tokens.shape == documents.shape == (8, 257)
    assert (np.diff(documents) >= 0).all() and tokens.max() < 4096


def test_full_size_lowers_to_the_kernels(example, monkeypatch):
    """350M parameters; remat keeps what the forward kernel leaves, so it runs once per layer."""
    hide_gpus(monkeypatch)
    for packed in (True, False):
        config = example.dataclasses.replace(
            example.SIZES["350m"], implementation="fa3", packed=packed
        )
        state = jax.eval_shape(lambda config=config: example.initialize(config))
        assert 350e6 < sum(x.size for x in jax.tree.leaves(state["params"])) < 355e6
        tokens = jax.ShapeDtypeStruct((config.rows, config.length + 1), jax.numpy.int32)
        step = functools.partial(example.train_step, config)
        found = targets(lower(step, state, tokens, tokens))
        # In the loop over layers and in its transpose.
        assert found.count("jax_fa3.fwd.v1") == found.count("jax_fa3.bwd.v1") == 1
        assert found.count("jax_fa3.segment_intervals.v1") == packed
