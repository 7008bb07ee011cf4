"""examples/generate.py, tiny: the model's own numbers, and for each request what it gets alone."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for name in ("flax", "optax", "orbax.checkpoint"):
    pytest.importorskip(name)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("generate")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def model(example):
    """config, parameters; two layers, for the pool has the pages of both."""
    config = example.dataclasses.replace(example.SIZES["tiny"], layers=2)
    params = example.initialize(config)["params"]
    # Larger than at the start of a training, where all tokens are about as likely.
    return config, jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, params)


def requests(example: Any, *lengths: int) -> Any:
    rng = np.random.default_rng(0)
    return [example.Request(rng.integers(1, 500, n).tolist(), 12) for n in lengths]


def test_same_logits_as_the_model(example, model):
    """Of a prompt that is read in two chunks, and a token behind it."""
    batching, gpt = (importlib.import_module(name) for name in ("batching", "gpt"))
    config, params = model
    engine = example.Engine(*model, example.Sizes())
    tokens = requests(example, 13)[0].tokens
    table = np.full((4, 8), batching.NO_PAGE, np.int32)
    table[2, :1] = 5
    found: Any = None
    for start, stop in ((0, 8), (8, 12), (12, 13)):
        lengths, starts = np.array([0, 0, stop, 0]), np.array([0, 0, 0, stop - start, stop - start])
        where = {"key_value_seq_lengths": lengths, "query_starts": starts, "page_table": table}
        rows = np.array(tokens[start:stop] + [0] * (24 - stop + start))
        args = config, engine.sizes, params, engine.pools, rows, where
        _, found, engine.pools = batching.step(*args)
    wanted = gpt.Transformer(config).apply({"params": params}, jnp.array([tokens]))
    np.testing.assert_allclose(found[2], wanted[0, -1], rtol=0.1, atol=0.1 * np.abs(wanted).max())
    close = np.corrcoef(np.asarray(found[2], float), np.asarray(wanted[0, -1], float))[0, 1]
    assert close > 0.999


def test_each_as_alone(example, model):
    """More requests than slots and pages; those that are done leave theirs."""
    lengths = 3, 40, 9, 17, 26, 8
    sizes = example.Sizes(pages=12)
    engine = example.Engine(*model, sizes)
    together = requests(example, *lengths)
    example.serve(engine, together, 2, quiet=True)
    assert sorted(engine.free) == list(range(12)) and not any(engine.slots)
    for request, other in zip(requests(example, *lengths), together, strict=True):
        example.serve(example.Engine(*model, sizes), [request], 1, quiet=True)
        assert request.tokens == other.tokens and request.finished
    assert len({tuple(request.tokens[-4:]) for request in together}) > 1
    with pytest.raises(SystemExit, match="a request needs 9 pages of 16, more than 128"):
        engine.admit(*requests(example, 130))


def test_runs(example, monkeypatch, capsys):
    arguments = ["--size", "tiny", "--steps", "1", "--length", "3", "--every", "1", "--alone"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments, "The default", "This"])
    example.main()
    printed = capsys.readouterr().out
    progress = r"^\[#{20}\] step +\d+  0 there, 0 to come  [\d,]+ tokens/s$"
    assert re.search(progress, printed, re.MULTILINE)
    assert re.search(r"^0: The default", printed, re.MULTILINE)
    assert printed.endswith("alone      the same texts\n")
