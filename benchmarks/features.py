"""What is beside a closed-form mask: dense masks, several intervals a row, bias, ALiBi, sinks; and who runs it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3

from .points import Point, point
from .rivals import Attention, Refused, window

SUITE = "features"


def points() -> list[Point]:
    """Each beside this library's closed form of as many scores or nearly so; bias beside cuDNN's."""
    passes = ("fwd", "bwd")

    def beside(contender: str, seqlen: int, baseline: str = "fa3", **fields: Any) -> list[Point]:
        fields |= {"contenders": (contender, baseline), "baseline": baseline}
        dims = fields.pop("dims", (64, 128))
        return [point(SUITE, d, seqlen, pass_name=p, **fields) for d in dims for p in passes]

    bias = partial(beside, "fa3 bias", baseline="cudnn bias")
    return [
        *beside("fa3 mask", 2048, is_causal=True, dims=(128,)),
        *beside("fa3 mask", 2048, blocks=True),
        *beside("fa3 intervals", 16384, is_causal=True, window=1023, first_keys=128),
        *beside("fa3 sinks", 2048, dims=(128,)),
        *beside("fa3 alibi", 2048, is_causal=True),
        *beside("fa3 learned-alibi", 2048, is_causal=True, dims=(128,))[1:],
        *beside("fa3 alibi", 4096, is_causal=True, heads=(32, 8), dims=(128,)),
        *beside("fa3 alibi", 512, is_causal=True, dims=(64,)),
        *beside("fa3 table", 2048),
        *beside("fa3 learned-table", 2048),
        *beside("fa3 learned-table", 512, dims=(64,)),
        *bias(2048),
        *bias(4096, is_causal=True),
    ]


def _fa3(point: Point, **options: Any) -> Any:
    return partial(
        jax_fa3.dot_product_attention,
        is_causal=point.is_causal,
        local_window_size=window(point),
        implementation="fa3",
        **options,
    )


def _mask(point: Point) -> Attention:
    """The same for all heads and batch entries."""
    mask = jnp.asarray(point.visible(slice(None)))[None, None]

    def attention(query, key, value, mask):
        return jax_fa3.dot_product_attention(query, key, value, mask=mask, implementation="fa3")

    return Attention(attention, (mask,))


def _first_keys(point: Point) -> Attention:
    begin, end = point.intervals()
    shape = point.batch, point.seqlen, 2
    first = np.minimum(point.first_keys, end)
    bounds = np.stack([begin, 0 * begin], -1), np.stack([end, first], -1)
    arrays = tuple(jnp.broadcast_to(jnp.asarray(x, jnp.int32), shape) for x in bounds)

    def attention(query, key, value, begin, end):
        return jax_fa3.dot_product_attention(
            query, key, value, key_begin=begin, key_end=end, implementation="fa3"
        )

    return Attention(attention, arrays)


def _sinks(point: Point) -> Attention:
    """So low that they change no result: what they cost does not depend on it."""
    return Attention(_fa3(point, sinks=jnp.full(point.num_heads_q, -30.0)))


def _alibi(point: Point, learned: bool) -> Attention:
    """Of slopes 0, which change no result, but are not known when it is compiled."""

    def attention(query, key, value, slopes):
        return _fa3(point, alibi_slopes=slopes)(query, key, value)

    return Attention(attention, (jnp.zeros(point.num_heads_q),), derivative=learned)


def _table(point: Point, learned: bool) -> Attention:
    """Of 128 distances either way, as T5 has it. Not of 0, which would be the same everywhere."""
    table = jax.random.normal(jax.random.key(0), (point.num_heads_q, 257))

    def attention(query, key, value, table):
        return _fa3(point, relative_bias=table)(query, key, value)

    return Attention(attention, (table,), derivative=learned)


def _bias(point: Point, cudnn: bool) -> Attention:
    """Zeros, in the point's dtype; the backward computes their gradient, too."""
    shape = 1, point.num_heads_q, point.seqlen, point.keys
    if point.window is not None:
        raise Refused("no bias beside a window here")
    attention = _fa3(point)
    if cudnn:
        attention = partial(
            jax.nn.dot_product_attention, is_causal=point.is_causal, implementation="cudnn"
        )
    return Attention(attention, (jnp.zeros(shape, point.dtype),), derivative=True)


CONTENDERS = {
    "fa3 mask": _mask,
    "fa3 intervals": _first_keys,
    "fa3 sinks": _sinks,
    "fa3 alibi": partial(_alibi, learned=False),
    "fa3 learned-alibi": partial(_alibi, learned=True),
    "fa3 table": partial(_table, learned=False),
    "fa3 learned-table": partial(_table, learned=True),
    "fa3 bias": partial(_bias, cudnn=False),
    "cudnn bias": partial(_bias, cudnn=True),
}
