"""The compiled module's pure functions, brute-forced on the host: they decide what a kernel reads."""

import itertools
import random
from typing import Any

import pytest
from masks import MARK, nearly_marked

C = pytest.importorskip("jax_fa3._C", reason="Python-only install", exc_type=ModuleNotFoundError)

LOW, HIGH = -(2**31), 2**31 - 1
UNBOUNDED = 2**62
WINDOWS = [-(2**61), LOW, -3, 0, 2, 2**33, 2**61, UNBOUNDED]
OFFSETS = [LOW, LOW + 5, -4, 0, 1, 6, HIGH - 5, HIGH]
Interval = tuple[int, int]
# Head dims of the kernels that were built.
KERNELS = [(h, v) for name, h, v in C.kernels() if name != "float8_e4m3fn"]
needs_kernels = pytest.mark.skipif(
    not {(64, 64), (128, 128), (192, 128), (192, 192), (256, 256)} <= set(KERNELS),
    reason="kernels were left out of this build",
)


def visible(row: int, T: int, S: int, left: int, right: int, offset: int, *lengths: int):
    """The interval of keys by the definition, in integers of any size."""
    length_q, length_k = lengths
    begin = max(0, row + offset - left)
    end = min(S, length_k, row + offset + right + 1)
    return (begin, end) if begin < end and row < min(T, length_q) else (0, 0)


@pytest.mark.parametrize("window", list(itertools.product(WINDOWS, WINDOWS)), ids=str)
def test_row_interval(window: Interval):
    lengths = [(T, S, q, k) for T in (1, 4) for S in (0, 1, 7) for q in (T, 2) for k in (S, 3)]
    lengths += [(4, 7, -1, 7), (4, 7, 4, LOW), (4, 7, HIGH, HIGH), (4, HIGH, 4, HIGH)]
    for (T, S, *used), offset in itertools.product(lengths, OFFSETS):
        for row in range(T + 2):  # the last tile reaches beyond the query
            arguments = row, T, S, *window, offset, *used
            assert C.row_interval(*arguments) == visible(*arguments), arguments


@pytest.mark.parametrize("offset", [LOW, -HIGH, 0, HIGH])
def test_row_interval_far_away(offset: int):
    """Windows that undo the offset, in sequences of the greatest length."""
    for row, shift in itertools.product([0, HIGH // 2, HIGH - 1], [-2, -1, 0, 1, 2]):
        for left, right in itertools.product([offset + shift, UNBOUNDED], [shift - offset, 3]):
            arguments = row, HIGH, HIGH, left, right, offset, HIGH, HIGH
            assert C.row_interval(*arguments) == visible(*arguments), arguments


@pytest.mark.parametrize("window", [0, 2**62])
def test_row_interval_of_arrays(window: int):
    """Both numbers of the mark make a row broken, unless it is padding; no others do."""
    for begin, end in zip(*(x[0].tolist() for x in nearly_marked().values()), strict=True):
        mark = (begin, end) == MARK
        seen = (max(begin, 0), min(end, 64)) if max(begin, 0) < min(end, 64) else (0, 0)
        for of_tile in (False, True):
            found = C.row_interval_of_arrays(begin, end, 64, window, 0, of_tile)
            assert found == (0, 0, False)
            found = C.row_interval_of_arrays(begin, end, 64, window, 1, of_tile)
            assert found == (*(MARK if mark else seen), mark)


def check_tile(first: int, count: int, *mask: int) -> None:
    """A tile's rows have the intervals that they have one by one, and the hull of these."""
    rows, hull = C.tile_rows(first, count, *mask)
    assert rows == [C.row_interval(first + i, *mask) for i in range(count)], (first, mask)
    ends = list(zip(*(row for row in rows if row[0] < row[1]), strict=True))
    wanted = tuple(side(x) for x in ends for side in (min, max)) or (HIGH, 0, HIGH, 0)
    assert hull == wanted, (first, mask)


@pytest.mark.parametrize("window", list(itertools.product(WINDOWS, WINDOWS)), ids=str)
def test_tile_rows(window: Interval):
    used = [(7, 7), (5, 3), (-1, 7), (7, LOW), (HIGH, HIGH)]
    for lengths, offset in itertools.product(used, OFFSETS):
        for first, S in itertools.product((0, 4), (0, 1, 7)):
            check_tile(first, 4, 7, S, *window, offset, *lengths)


@pytest.mark.parametrize("offset", [LOW, -HIGH, 0, HIGH])
def test_tile_rows_far_away(offset: int):
    """In the longest sequences that the handlers take, their last tile, too."""
    longest = HIGH - 256
    for first, shift in itertools.product([0, longest // 128 * 128], [-200, -1, 0, 1, 200]):
        for left, right in itertools.product([offset + shift, UNBOUNDED], [shift - offset, 3]):
            check_tile(first, 128, longest, longest, left, right, offset, longest, HIGH)


def check_blocks(rows: list[Interval], block: int, tight: bool) -> None:
    """No visible key is missed, and in a full block every row that sees a key sees all keys.

    tight: no row's interval is far from the others, so that each visited block has a visible key
    and each block without a masked one is a full one.
    """
    begin, full_begin, full_end, end = C.block_range(rows, block)
    seeing = [set(range(*row)) for row in rows if row[0] < row[1]]
    if not seeing:
        assert begin == end and full_begin >= full_end
        return
    assert begin < end and min(map(min, seeing)) // block == begin
    assert max(map(max, seeing)) // block == end - 1
    full = range(full_begin, full_end)
    assert not full or begin <= full_begin <= full_end <= end
    for n in range(begin, end):
        keys = set(range(n * block, (n + 1) * block))
        if n in full or tight:
            assert (n in full) == all(keys <= row for row in seeing), (rows, block, n)
        if tight:
            assert any(keys & row for row in seeing), (rows, block, n)


@pytest.mark.parametrize("block", [1, 3, 4])
def test_block_range_of_closed_forms(block: int):
    """Every window and offset over small shapes: exactly the blocks that are needed."""
    sides = [-3, -1, 0, 1, 5, UNBOUNDED]
    for S, left, right, offset in itertools.product((1, 5, 12), sides, sides, (-6, -1, 0, 2, 9)):
        mask = S, left, right, offset, 7, S - 1
        rows = [C.row_interval(row, 8, *mask) for row in range(10)]
        for first, height in itertools.product((0, 2, 4, 6), (1, 4)):
            check_blocks(rows[first : first + height], block, tight=True)


@pytest.mark.parametrize("block", [1, 4, 5])
def test_block_range_of_any_intervals(block: int):
    """In any order, with gaps between them, with rows that see nothing or are broken."""
    rng = random.Random(block)
    for _ in range(2000):
        rows = [(rng.randrange(25), rng.randrange(25)) for _ in range(rng.randrange(5))]
        rows += rng.choices([(0, 0), MARK], k=rng.randrange(3))
        rng.shuffle(rows)
        check_blocks(rows, block, tight=False)


def test_block_range_far_away():
    rows = [(5, HIGH - 255), (2**30 + 1, HIGH - 129)]
    assert C.block_range(rows, 128) == (0, 2**23 + 1, 2**24 - 2, 2**24 - 1)


@pytest.mark.parametrize("section", [1, 2, 3, 4, 6, 100])
def test_tile_order(section: int):
    for blocks, heads, batch in itertools.product((1, 2, 5), (1, 4, 6), (1, 3)):
        tiles = C.tile_order(blocks, heads, batch, section, False)
        assert sorted(tiles) == sorted(itertools.product(*map(range, (blocks, heads, batch))))
        # Sections one after the other; in each the last rows first.
        keys = [((entry * heads + head) // section, -m_block) for m_block, head, entry in tiles]
        assert keys == sorted(keys)


@pytest.mark.parametrize("section", [1, 4, 9, 16, 40])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_fwd_tile_order(section: int, group: int):
    """The last section as ever, what is before it in smaller ones, of several whole groups."""
    section = max(section // group, 1) * group
    for blocks, heads, batch in itertools.product((1, 5, 70), (6, 24), (1, 3)):
        most = min(section, heads * batch)
        tiles = C.fwd_tile_order(blocks, heads, batch, most, group)
        assert sorted(tiles) == sorted(itertools.product(*map(range, (blocks, heads, batch))))
        small = max(most // group // 8, 1) * group
        if small == group and small * blocks < 132:
            small, early = most, heads * batch
        else:
            early = (heads * batch - most) // small * small
        rows = [entry * heads + head for _, head, entry in tiles]
        sections = [min(row, early) // small for row in rows]
        keys = [(part, -tile[0]) for part, tile in zip(sections, tiles, strict=True)]
        assert keys == sorted(keys)


def test_tile_order_short_last():
    for blocks, heads, section in itertools.product((1, 2, 5), (1, 4), (1, 3)):
        whole = C.tile_order(blocks - 1, heads, 2, section, False)
        short = [(blocks - 1, head, entry) for entry in range(2) for head in range(heads)]
        assert C.tile_order(blocks, heads, 2, section, True) == whole + short


def test_tile_order_of_nothing():
    for *sizes, short_last in itertools.product((0, 2), (0, 2), (0, 2), (False, True)):
        assert bool(C.tile_order(*sizes, 2, short_last)) == all(sizes)


@pytest.mark.parametrize("ctas", [1, 2, 7, 132])
def test_rounds(ctas: int):
    """Each round deals out its own tiles; over two rounds every CTA has the same sum of ranks."""
    rounds = [[C.tile_of_round(n, cta, ctas) for cta in range(ctas)] for n in range(6)]
    for n, tiles in enumerate(rounds):
        assert sorted(tiles) == list(range(n * ctas, (n + 1) * ctas))
    assert len({a + b for a, b in zip(rounds[0], rounds[1], strict=True)}) == 1


@pytest.mark.parametrize("group", [1, 3, 64])
@pytest.mark.parametrize("head_dims", [(8, 8), (64, 64), (192, 128), (256, 256)])
def test_heads_per_section(head_dims: Interval, group: int):
    """Whole groups, as many as the L2 cache holds, and fewer for longer sequences."""
    found = [C.heads_per_section(S, *head_dims, group) for S in (0, 1, 999, 2**13, 2**20, HIGH)]
    assert found == sorted(found, reverse=True)
    assert all(heads >= 1 and heads % group == 0 for heads in found)
    assert found[-1] == group
    heads = C.heads_per_section(2**13, *head_dims, group)
    size = 2**13 * sum(head_dims) * 2  # bytes of one head's K and V
    assert heads == group * min(max(2**25 // size, 1), 1024)


TILES: list[Any] = [
    # head_dim, head_dim_v, block_m with many and with few keys, block_n
    (8, 8, 192, 128, 128),
    (64, 64, 192, 128, 128),
    (72, 8, 192, 128, 112),
    (80, 80, 192, 128, 112),
    (88, 8, 128, 128, 128),
    (96, 96, 128, 128, 128),
    (128, 128, 128, 128, 128),
    (136, 8, 128, 128, 128),
    (192, 128, 128, 128, 128),
    (192, 136, 128, 128, 112),
    (192, 192, 128, 128, 112),
    (200, 8, 128, 128, 80),
    (256, 256, 128, 128, 80),
    (264, 8, 128, 128, 128),
    (64, 264, 128, 128, 128),
    (576, 512, 128, 128, 128),
]


@pytest.mark.parametrize("head_dim, head_dim_v, many, few, block_n", TILES)
def test_tile(head_dim: int, head_dim_v: int, many: int, few: int, block_n: int):
    assert C.tile(head_dim, head_dim_v, False) == (many, block_n)
    assert C.tile(head_dim, head_dim_v, True) == (few, block_n)


@needs_kernels
@pytest.mark.parametrize("head_dim, head_dim_v, many, few, _", TILES)
def test_fwd_long_sums(head_dim: int, head_dim_v: int, many: int, few: int, _: int):
    """Room for a tile of every CTA, with 8 numbers more a row, from 2^18 keys on."""
    assert C.fwd_long_sums(0, head_dim, head_dim_v) == 0
    assert C.fwd_long_sums(2**18, head_dim, head_dim_v) == 0
    if max(head_dim, head_dim_v) > 256:  # they take no more keys than that
        assert C.fwd_long_sums(HIGH, head_dim, head_dim_v) == 0
        return
    columns = next(v for h, v in KERNELS if h >= head_dim and v >= head_dim_v)
    for keys in (2**18 + 1, HIGH):
        found = C.fwd_long_sums(keys, head_dim, head_dim_v)
        assert found == 132 * max(many, few) * (columns + 8)


@needs_kernels
def test_no_long_sums_without_a_kernel():
    assert C.fwd_long_sums(HIGH, 584, 64) == C.fwd_long_sums(HIGH, 64, 520) == 0
