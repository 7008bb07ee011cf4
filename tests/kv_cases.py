"""Calls of jax_fa3.kv_cache, and what they have to give: NumPy in fp64, one row after the other."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from modes import strict

from jax_fa3 import kv_cache

E4M3 = jnp.float8_e4m3fn
GARBAGE = 2**31 - 1, -1, 10**6  # in table entries that nobody needs


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences with this many query rows and this long, the rows included."""

    name: str
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    page: int = 16
    N: int = 4
    K: int = 2
    H: int = 16
    V: int | None = None
    pages: int | None = None  # of a sequence; None: as the longest one needs
    ragged: bool = False
    spare: int = 0  # ragged rows behind the last sequence, and sequences beyond num_sequences
    contiguous: bool = False
    layout: str = "NHD"
    cache_dtype: Any = None
    scales: str = ""  # "scalar", "heads", "sequences", "tokens"
    values: tuple[float, float] = (0.0, 1.0)  # mean and deviation of what is random
    options: Any = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def B(self) -> int:
        return len(self.counts)

    @property
    def head_dim_v(self) -> int:
        return self.H if self.V is None else self.V

    @property
    def rows(self) -> int:
        return sum(self.counts)


class Inputs:
    """Random numbers where a case has some, and NaN everywhere else in the pool and the query."""

    def __init__(self, case: Case, dtype: Any, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.case, self.rng = case, rng
        cache_dtype = case.cache_dtype or dtype
        width = case.pages or max(1, -(-max(case.lengths) // case.page))
        width = 1 if case.contiguous else width
        self.page = (case.pages or 1) * case.page if case.contiguous else case.page
        total = case.B * width + 3
        order = rng.permutation(total)[: case.B * width].reshape(case.B, width)
        self.pages = order
        needed = np.arange(width) * self.page < np.array(case.lengths)[:, None]
        self.table = np.where(needed, order, rng.choice(GARBAGE, order.shape))
        shape = total, self.page, case.K
        key, value = (np.full((*shape, d), np.nan) for d in (case.H, case.head_dim_v))
        self.scale = [np.ones(shape) for _ in range(2)]
        if case.scales == "tokens":
            self.scale = [np.full(shape, np.nan) for _ in range(2)]
        for b, length in enumerate(case.lengths):
            for p in range(max(length, 0)):
                page, slot = order[b, p // self.page], p % self.page
                key[page, slot] = _rounded(rng.normal(*case.values, key.shape[2:]), cache_dtype)
                value[page, slot] = _rounded(rng.normal(*case.values, value.shape[2:]), cache_dtype)
                if case.scales == "tokens":
                    for scale in self.scale:
                        scale[page, slot] = rng.uniform(0.5, 2, case.K)
        self.key, self.value, self.cache_dtype = key, value, cache_dtype
        self.query = _rounded(rng.normal(*case.values, (case.rows, case.N, case.H)), dtype)
        self.dtype = dtype
        self.given_scales = self._given_scales()

    def _given_scales(self) -> dict[str, Any]:
        case, rng = self.case, self.rng
        if not case.scales:
            return {}
        shapes: Any = {"scalar": (), "heads": (case.K,), "sequences": (case.B, case.K)}
        given = {}
        for i, name in enumerate(("key_scale", "value_scale")):
            if case.scales == "tokens":
                x = self.scale[i]
                given[name] = np.swapaxes(x, 1, 2) if case.layout == "HND" else x[..., None]
                continue
            x = rng.uniform(0.5, 2, shapes[case.scales])
            given[name] = x
            for b in range(case.B):
                self.scale[i][self.pages[b]] = x[b] if x.ndim == 2 else x
        return {name: np.asarray(x, np.float32) for name, x in given.items()}

    def chosen(self, arguments: dict[str, Any], order: list[int]) -> tuple[dict[str, Any], Any]:
        """The arguments of a ragged call for these sequences alone, and which rows they are."""
        counts = self.case.counts
        starts = np.cumsum([0, *counts])
        rows = np.concatenate([np.arange(starts[b], starts[b + 1]) for b in order])
        fewer = {
            "query": arguments["query"][rows],
            "page_table": self.table[order],
            "key_value_seq_lengths": np.array(self.case.lengths)[order],
            "query_starts": np.cumsum([0, *(counts[b] for b in order)]),
        }
        return arguments | fewer, rows

    def caches(self) -> tuple[Any, Any]:
        return as_layout(self.key, self.value, self.case.layout, self.cache_dtype)

    def where(self) -> dict[str, Any]:
        """The arguments that say where things are."""
        case = self.case
        found: dict[str, Any] = {"page_table": self.table}
        if case.contiguous:
            found = {"cache_rows": self.table[:, 0]}
        lengths = np.array(case.lengths)
        if case.ragged:
            starts = np.cumsum([0, *case.counts])
            if case.spare:
                starts = np.concatenate([starts, [77, -5]])
                lengths = np.concatenate([lengths, [10**6, 3]])
                found["num_sequences"] = np.array([case.B])
                found = {
                    name: np.concatenate([x, np.full((2, *x.shape[1:]), -7)])
                    if name != "num_sequences"
                    else x
                    for name, x in found.items()
                }
            found["query_starts"] = starts
        return {"key_value_seq_lengths": lengths, **found}

    def shaped(self, x: np.ndarray) -> np.ndarray:
        """Rows as the call has them."""
        if self.case.ragged:
            return np.concatenate([x, np.full((self.case.spare, *x.shape[1:]), np.nan)])
        return x.reshape(self.case.B, -1, *x.shape[1:])

    def arguments(self) -> dict[str, Any]:
        """Of kv_cache.dot_product_attention."""
        query = jnp.asarray(self.shaped(self.query), self.dtype)
        key, value = self.caches()
        named = {"query": query, "key_cache": key, "value_cache": value}
        options = {**self.given_scales, **self.case.options}
        if self.case.layout != "NHD":
            options["kv_layout"] = self.case.layout
        return {**named, **self.where(), **options}

    def wanted(self) -> tuple[np.ndarray, np.ndarray]:
        """out and lse of all rows, [rows, N, V] and [rows, N]."""
        case, row = self.case, 0
        out = np.zeros((case.rows, case.N, case.head_dim_v))
        lse = np.full((case.rows, case.N), -np.inf)
        for b, (count, length) in enumerate(zip(case.counts, case.lengths, strict=True)):
            for i in range(count):
                for n in range(case.N):
                    out[row, n], lse[row, n] = self._row(b, row, i, length - count + i, n)
                row += 1
        return out, lse

    def _row(self, b: int, row: int, i: int, position: int, n: int) -> tuple[Any, float]:
        case, k = self.case, n // (self.case.N // self.case.K)
        options = case.options
        begin, end = 0, max(case.lengths[b], 0)
        size = options.get("local_window_size")
        left, right = size if isinstance(size, tuple) else (size, size)
        if options.get("is_causal", True):
            end = min(end, position + 1)
        if left is not None:
            begin, end = max(begin, position - left), min(end, position + right + 1)
        for name, bound in (("key_begin", max), ("key_end", min)):
            if (given := options.get(name)) is not None:
                given = np.asarray(given)
                at = given[b] if given.ndim == 1 and len(given) == case.B else given.ravel()[row]
                at = at[i] if np.ndim(at) else at
                begin, end = (bound(begin, at), end) if bound is max else (begin, bound(end, at))
        if begin >= end:
            return 0.0, -np.inf
        where = np.arange(begin, end)
        pages, slots = self.pages[b, where // self.page], where % self.page
        keys = self.key[pages, slots, k] * self.scale[0][pages, slots, k, None]
        values = self.value[pages, slots, k] * self.scale[1][pages, slots, k, None]
        scores = keys @ self.query[row, n] * options.get("scale", case.H**-0.5)
        if (cap := options.get("logits_soft_cap")) is not None:
            scores = cap * np.tanh(scores / cap)
        if (sinks := options.get("sinks")) is not None:
            scores = np.append(scores, np.asarray(sinks, float)[n])
            values = np.concatenate([values, np.zeros((1, case.head_dim_v))])
        weights = np.exp(scores - scores.max())
        return weights @ values / weights.sum(), scores.max() + np.log(weights.sum())


def as_layout(key: np.ndarray, value: np.ndarray, layout: str, dtype: Any) -> tuple[Any, Any]:
    """[P, page, K, D] each as key_cache and value_cache."""
    key, value = (x.astype(np.float32) if dtype == E4M3 else x for x in (key, value))
    if layout == "NHD":
        return jnp.asarray(key, dtype), jnp.asarray(value, dtype)
    if layout == "HND":
        return tuple(jnp.asarray(np.swapaxes(x, 1, 2), dtype) for x in (key, value))  # pyright: ignore
    if layout == "lanes":
        return jnp.asarray(np.concatenate([key, value], -1), dtype), None
    both = np.stack([key, value], 3)
    return jnp.asarray(both.reshape(*key.shape[:2], -1, key.shape[-1]), dtype), None


def _rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    return np.asarray(x, jnp.dtype(dtype)).astype(np.float64)


def assert_right(inputs: Inputs, found: Any, eps: float = 2e-6) -> None:
    """Within a few units in the last place, of scores too where those are large; rows outside of all
    sequences are 0 and -inf."""
    case = inputs.case
    largest = (np.nanmax(np.linalg.norm(x, axis=-1)) for x in (inputs.query, inputs.key))
    of_score = 2.0**-23 * max(math.prod(largest) * case.options.get("scale", case.H**-0.5) - 32, 0)
    of_out = 2 * of_score * np.nanmax(np.abs(inputs.value), initial=0)
    out, lse = (np.asarray(x, np.float64) for x in found)
    out, lse = out.reshape(-1, *out.shape[-2:]), lse.reshape(-1, lse.shape[-1])
    np.testing.assert_array_equal(out[case.rows :], 0)
    np.testing.assert_array_equal(lse[case.rows :], -np.inf)
    wanted = inputs.wanted()
    np.testing.assert_allclose(out[: case.rows], wanted[0], rtol=eps, atol=2 * eps + of_out)
    np.testing.assert_allclose(lse[: case.rows], wanted[1], rtol=2e-6, atol=4e-6 + of_score)


def run(arguments: dict[str, Any]) -> Any:
    with strict():
        return kv_cache.dot_product_attention(**arguments, return_residual=True)
