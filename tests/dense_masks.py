"""Dense masks of blocks, several intervals a row, and the bits that are to be made of them."""

from typing import Any

import numpy as np

T, S = 700, 1000
RNG = np.random.default_rng(0)


def blocks(size: int, *leading: int, share: float = 0.5) -> np.ndarray:
    """Random blocks of size x size, so many of them hidden."""
    shown = RNG.random((*leading, -(-T // size), -(-S // size))) < share
    return np.kron(shown, np.ones((1, 1, size, size), bool))[..., :T, :S]


MASKS: dict[str, np.ndarray] = {
    "blocks": blocks(128, 2, 1),
    "small blocks": blocks(64, 1, 1),
    "few blocks": blocks(128, 2, 1, share=0.15),
    "blocks of heads": blocks(128, 1, 4),
    "blocks of all": blocks(128, 2, 4),
    "other blocks": blocks(100, 2, 1),
    "keys": RNG.random((2, 1, 1, S)) < 0.5,
    "blocks of keys": np.repeat(RNG.random((1, 1, 1, 8)) < 0.5, 128, 3)[..., :S],
    "rows": RNG.random((1, 4, T, 1)) < 0.5,
    "nothing": np.zeros((1, 1, T, S), bool),
    "everything": np.ones((2, 1, T, S), bool),
    "one score": (np.arange(T * S) == 345 * S + 678).reshape(1, 1, T, S),
}


def bits_of(mask: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """What `_mask_bits` says of its results, for [B, N, rows, columns] that are none of them 1."""
    batch, heads, rows, columns = mask.shape
    all_rows, all_columns = -(-rows // 128) * 128, -(-columns // 128) * 128
    whole = np.zeros((batch, heads, all_rows, all_columns), bool)
    whole[..., :rows, :columns] = mask
    # Word q has of each 8 columns 2 q and 2 q + 1.
    parts = whole.reshape(batch, heads, all_rows, -1, 16, 4, 2).swapaxes(4, 5)
    weights = (1 << np.arange(32, dtype=np.uint64)).reshape(16, 2)
    bits = (parts * weights).sum((-1, -2)).astype(np.uint32)
    seen = whole.reshape(batch, heads, all_rows // 128, 128, -1, width)
    hides = np.zeros_like(whole)
    hides[..., :rows, :columns] = ~mask
    full = ~hides.reshape(seen.shape).any((3, 5))
    words: list[Any] = []
    of_blocks: list[Any] = [(seen.any((3, 5)), False), (full, True)]
    for x, rest in of_blocks:
        short = -x.shape[3] % 32
        x = np.pad(x, ((0, 0), (0, 0), (0, 0), (0, short)), constant_values=rest)
        words.append(
            (x.reshape(*x.shape[:3], -1, 32) * (1 << np.arange(32, dtype=np.uint64))).sum(-1)
        )
    return bits.reshape(batch, heads, all_rows, -1), np.stack(words, -1).astype(np.uint32)


def window_and_first(window: int, first: int) -> dict[str, Any]:
    """Two intervals a row, which meet or lie apart; and one that is empty."""
    rows = np.arange(T)
    begin = np.stack([rows - window, 0 * rows, rows % 7], -1)
    end = np.stack([rows + 1, 0 * rows + first, rows % 5], -1)
    begin, end = (np.broadcast_to(x, (2, T, 3)).astype(np.int32) for x in (begin, end))
    return {"key_begin": begin, "key_end": end}


def random_intervals(count: int) -> dict[str, Any]:
    begin = RNG.integers(-50, S, (2, T, count))
    return {"key_begin": begin, "key_end": begin + RNG.integers(-20, 300, begin.shape)}


INTERVALS = {
    "window": window_and_first(150, 30),
    "long window": window_and_first(400, 128),
    "one": random_intervals(1),
    "four": random_intervals(4),
}
