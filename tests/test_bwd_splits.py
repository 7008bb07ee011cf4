"""How many CTAs share the rows of a block of keys in the backward: decided on the host."""

import itertools
import random
from typing import Any

import pytest

C = pytest.importorskip("jax_fa3._C", reason="Python-only install", exc_type=ModuleNotFoundError)

HIGH = 2**31 - 1
UNBOUNDED = 2**62
KERNELS = {(h, v) for name, h, v in C.kernels() if name != "float8_e4m3fn"}
pytestmark = pytest.mark.skipif(
    not {(64, 64), (128, 128), (192, 192), (256, 256)} <= KERNELS,
    reason="kernels were left out of this build",
)


def splits(*sizes: int, causal: bool = False, in_turn: bool = False) -> int:
    """Of batch, lengths, heads and head dims: how many CTAs share the rows of a block of keys."""
    return C.bwd_splits(sizes, (UNBOUNDED, 0 if causal else UNBOUNDED), causal, in_turn)


EITHER: list[dict[str, bool]] = [
    {"causal": causal, "in_turn": in_turn}
    for causal, in_turn in itertools.product((False, True), (False, True))
]


@pytest.mark.parametrize("options", EITHER, ids=str)
@pytest.mark.parametrize("head_dim, heads", [(64, 32), (128, 16), (256, 8)])
def test_splits_of_a_full_gpu(head_dim: int, heads: int, options: Any):
    """The points of the paper's figures, 16k tokens in all: none."""
    for length in (512, 1024, 2048, 4096, 8192, 16384):
        sizes = 16384 // length, length, length, heads, heads, head_dim, head_dim
        assert splits(*sizes, **options) == 0


def test_splits_of_one_sequence():
    """Of multi-query attention there are 64 blocks of keys, or 128, for 132 SMs."""
    assert splits(1, 8192, 8192, 8, 1, 128, 128, causal=True) >= 4
    assert splits(1, 8192, 8192, 8, 1, 64, 64, causal=True) >= 4
    assert splits(1, 8192, 8192, 8, 1, 128, 128) == 2
    assert splits(1, 4096, 64, 1, 1, 128, 128) >= 16  # one block


@pytest.mark.parametrize("options", EITHER, ids=str)
def test_splits_of_long_sums(options: Any):
    """Sums of more than 65,536 rows are cut, also where nothing is shared."""
    assert splits(2, 16384, 65536, 32, 8, 128, 128, **options) == 0
    assert splits(2, 16385, 65536, 32, 8, 128, 128, **options) == 1
    assert splits(1, 2**20, 2**20, 8, 1, 128, 128, **options) == 1
    assert splits(1, HIGH, 2**24, 8, 8, 256, 256, **options) == 1
    for length in (65536, 65537):  # one head, few keys: shared as far as rows go
        assert splits(1, length, 64, 1, 1, 128, 128, **options) > 1


def test_splits_are_no_more_than_fill_the_gpu():
    """Nor more than there are steps; and shared fairly, by heads or by ranges of each head's rows."""
    rng = random.Random(0)
    shared = 0
    for _ in range(300):
        batch, k, group = rng.choice((1, 2, 5)), rng.choice((1, 2, 3, 8)), rng.choice((1, 2, 3, 8))
        T, S = (rng.choice((1, 64, 65, 500, 3000, 2**15, 2**18)) for _ in range(2))
        head_dim = rng.choice((8, 64, 128, 192, 256))
        options = rng.choice(EITHER)
        found = splits(batch, T, S, k * group, k, head_dim, head_dim, **options)
        if found <= 1:
            assert found == (group * T > 2**16)
            continue
        shared += 1
        block_m, block_n = 128 if head_dim <= 64 else 64, {192: 96, 256: 64}.get(head_dim, 128)
        tiles = -(-S // block_n) * k * batch
        assert found <= 1024 and (found - 1) * tiles <= 8 * 132
        assert 2 * found <= group * -(-T // block_m)
        assert found <= group or found % group == 0
    assert shared > 50


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [256, 512])
def test_splits_are_the_same_where_gradients_always_are(head_dim: int, causal: bool):
    """Else deterministic_backward would change the order of sums that have but one."""
    if (head_dim, head_dim) not in KERNELS:
        pytest.skip("kernels were left out of this build")
    shared = 0
    for batch, length, k in itertools.product((1, 2, 4), (512, 1024, 2048, 4096), (1, 2, 4, 8)):
        sizes = batch, length, length, 8, k, head_dim, head_dim
        found = splits(*sizes, causal=causal)
        assert found == splits(*sizes, causal=causal, in_turn=True)
        shared += found > 1
    assert shared > 3


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("options", EITHER, ids=str)
def test_splits_of_nothing(place: int, options: Any):
    sizes = [1, 2**20, 64, 8, 1, 128, 128]
    assert splits(*sizes, **options) > 1
    sizes[place] = 0 if place < 5 else 584  # which no kernel takes
    assert splits(*sizes, **options) == 0


def test_splits_of_what_a_window_leaves():
    """A block of keys that few rows see is not shared as if all saw it."""
    sizes = 1, 2**16, 128, 8, 1, 128, 128
    assert C.bwd_splits(sizes, (UNBOUNDED, UNBOUNDED), False, False) > 64
    assert 1 < C.bwd_splits(sizes, (200, 0), True, False) <= 8 * (127 + 200 + 64) // 64 // 2
    for window in [(-(2**61), 2**61), (2**61, -(2**61))]:  # no row at all; T > 2^16 by itself
        assert C.bwd_splits(sizes, window, True, False) == 1
