"""The points of the benchmark's tables: shapes, masks, FLOPs."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind an installed jax_fa3

from benchmarks.points import TOKENS, point
from benchmarks.suites import DOCUMENTS, LENGTHS, SUITES, select


def test_paper_points():
    points = select(["paper"])
    assert len(points) == 3 * 36
    for p in points:
        assert p.batch * p.seqlen == TOKENS and p.num_heads_q * p.head_dim == 2048
    assert {p.seqlen for p in points} == set(LENGTHS)
    assert {p.pass_name for p in points} == {"fwd", "bwd", "fwd+bwd"}
    assert len(select(["quick"])) == 8


def test_names_are_unique_and_selectable():
    names = [p.name for suite in SUITES if suite != "quick" for p in select([suite])]
    assert len(names) == len(set(names))
    assert [p.name for p in select(["paper"], ["fwd-d128-causal-s8192"])] == [
        "fwd-d128-causal-s8192"
    ]
    assert sum(DOCUMENTS) == TOKENS


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("documents", [None, (100, 50, 106)])
def test_intervals_and_shares(causal, window, documents):
    p = point("masks", 64, 256, is_causal=causal, window=window, documents=documents)
    i, j = np.arange(256)[:, None], np.arange(256)[None, :]
    visible = np.ones((256, 256), bool)
    if documents:
        ids = p.segment_ids()
        visible &= ids[:, None] == ids[None, :]
    if causal:
        visible &= j <= i
    if window is not None:
        visible &= j >= i - window
    begin, end = p.intervals()
    np.testing.assert_array_equal((j >= begin[:, None]) & (j < end[:, None]), visible)
    blocks = visible.reshape(4, 64, 8, 32).any(axis=(1, 3))
    assert p.visible_share(64, 32) == pytest.approx(blocks.mean())
    if p.mask not in ("full", "causal"):
        assert p.flops() == p.batch * p.num_heads_q * visible.sum() * 4 * 64


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [96, 512])
def test_other_keys_than_queries(keys, causal):
    p = point("masks", 64, 256, seqlen_k=keys, is_causal=causal)
    i, j = np.arange(256)[:, None], np.arange(keys)[None, :]
    visible = np.broadcast_to(j <= i, (256, keys)) | (not causal)
    begin, end = p.intervals()
    np.testing.assert_array_equal((j >= begin[:, None]) & (j < end[:, None]), visible)
    blocks = visible.reshape(4, 64, -1, 32).any(axis=(1, 3))
    assert p.visible_share(64, 32) == pytest.approx(blocks.mean())
    assert p.flops() == p.batch * p.num_heads_q * visible.sum() * 4 * 64


def test_flops_as_the_papers_count():
    full, causal = point("paper", 128, 8192), point("paper", 128, 8192, is_causal=True)
    assert full.flops() == 4 * 2 * 16 * 8192 * 8192 * 128
    assert causal.flops() == full.flops() / 2
    assert (
        point("dims", 192, 2048, head_dim_v=128, heads=(1, 1), batch=1).flops() == 2 * 2048**2 * 320
    )
