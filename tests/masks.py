"""Mask arguments as NumPy arrays, for tables of cases."""

from typing import Any

import numpy as np

# key_begin and key_end of a row whose segment is a broken run; any other pair is an interval.
MARK = 0x7FFA3FA3, -0x7FFA3FA3


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def documents(*lengths: int, ids: Any = None) -> np.ndarray:
    """Segment ids of packed documents, [sum of lengths]; ids default to 0, 1, 2 ..."""
    ids = np.arange(len(lengths)) if ids is None else ids
    return np.repeat(np.asarray(ids, np.int32), lengths)


def packed(query: np.ndarray, key: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Both segment arguments, [1, T] and [1, S]."""
    key = query if key is None else key
    return {"query_segment_ids": query[None], "key_value_segment_ids": key[None]}


def prefix_lm(T: int, *prefixes: int) -> dict[str, np.ndarray]:
    """Everybody sees the prefix, and beyond it causal; one prefix per batch entry."""
    end = np.maximum(np.arange(1, T + 1), np.array(prefixes)[:, None])
    return {"key_end": end.astype(np.int32)}


def chunked(B: int, T: int, chunk: int) -> dict[str, np.ndarray]:
    """Causal within chunks of this size."""
    begin = np.broadcast_to(np.arange(T) // chunk * chunk, (B, T))
    return {"key_begin": begin.astype(np.int32), "key_end": ints(*[range(1, T + 1)] * B)}


def scattered(B: int, T: int, S: int, spread: int = 0) -> dict[str, np.ndarray]:
    """Any two numbers per row: reversed, not monotone and, by spread, out of range."""
    rng = np.random.default_rng(T)
    begin, end = rng.integers(-spread, S + spread, (2, B, T))
    return {"key_begin": begin.astype(np.int32), "key_end": end.astype(np.int32)}


def nearly_marked() -> dict[str, np.ndarray]:
    """[1, 36]: pairs of int32's extremes, the mark's numbers and their neighbours; one is the mark."""
    most, least = 2**31 - 1, -(2**31)
    begins = most, MARK[0] + 1, MARK[0], MARK[0] - 1, 0, least
    ends = least, MARK[1] - 1, MARK[1], MARK[1] + 1, 40, most
    begin, end = np.meshgrid(begins, ends)
    return {"key_begin": ints(begin.ravel()), "key_end": ints(end.ravel())}


def key_lengths(*lengths: int) -> dict[str, np.ndarray]:
    return {"key_value_seq_lengths": ints(*lengths)}
