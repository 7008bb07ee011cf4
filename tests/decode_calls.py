"""Custom calls on KV caches as the library makes them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from call_operands import B, H, K, N, S, Struct, T, V
from recorded_calls import Call, recorded

from jax_fa3.kv_cache import _append_ffi, _write, _xla
from jax_fa3.kv_cache import _ffi as _decode
from jax_fa3.kv_cache._layout import Layout
from jax_fa3.kv_cache._rotary import Tables
from jax_fa3.kv_cache._sequences import Where


def decode_calls() -> dict[str, Call]:
    """A ragged call of everything there is, on pages, and one of nothing but a cache, whose rows are
    the sequences' own."""

    def ints(*shape: int) -> Any:
        return Struct(shape, jnp.int32)

    layout = Layout("NHD", K, H, V)
    every = _xla.Config(layout, 0.5, (7, 3), 30.0, None)
    where = Where(ints(B), ints(B, 5), ints(B + 1), ints())
    caches: Any = tuple(Struct((9, 16, K, columns), jnp.bfloat16) for columns in (H, V))
    sinks: Any = Struct((N,), jnp.float32)
    operands = _xla.Operands(caches, where, ints(B), None, sinks)
    lanes = dataclasses.replace(every, layout=dataclasses.replace(layout, kind="lanes"))
    shared: Any = (Struct((4, S, K, H + V), jnp.bfloat16),)
    plain = _xla.Operands(shared, Where(ints(4)))

    def decode(config: _xla.Config, query: Struct, operands: _xla.Operands) -> Call:
        return recorded(lambda *x: _decode.attention(config, *x), query, operands)

    e4m3: Any = tuple(Struct((9, 16, K, H), jnp.float8_e4m3fn) for _ in range(2))
    of_tokens: Any = Struct((9, 16, K, 1), jnp.float32)
    of_heads: Any = Struct((B, K), jnp.float32)
    scaled = _xla.Operands(e4m3, where, None, None, None, of_heads, of_tokens)
    square = dataclasses.replace(every, layout=dataclasses.replace(layout, head_dim_v=H))
    rows = B * T
    query, key, value = (Struct((rows, n, h), jnp.bfloat16) for n, h in ((N, H), (K, H), (K, V)))
    write = _write.Config(layout, True)
    tables = Tables(*[Struct((77, H // 4), jnp.float32)] * 2)  # pyright: ignore
    new = _write.Operands(value, caches, where, query, ints(rows), tables)  # pyright: ignore
    narrow = _write.Operands(key, e4m3, where, None, None, None, of_heads, of_tokens)  # pyright: ignore
    with_square = dataclasses.replace(write, layout=square.layout)
    # Scales are a cache with H = V = 1.
    one: Any = Struct((4, 1, K, 1), jnp.float32)
    pools: Any = (Struct((4, S, K, 1), jnp.float32),) * 2
    scales = _write.Config(Layout("NHD", K, 1, 1), False)

    def append(config: _write.Config, key: Any, operands: _write.Operands) -> Call:
        return recorded(lambda *x: _append_ffi.append(config, *x), key, operands)

    def both(config: _xla.Config, write: _write.Config, new: Any, attended: Any) -> Call:
        function = _append_ffi.append_and_attend
        return recorded(lambda *x: function((write, config), *x), query, key, new, attended)

    return {
        "append": append(write, key, new),
        "append e4m3": append(with_square, key, narrow),
        "append scales": append(scales, one, _write.Operands(one, pools, Where(ints(4)))),
        "append and attend": both(every, write, new, operands),
        "append and attend e4m3": both(square, with_square, narrow, scaled),
        "decode e4m3": decode(square, Struct((B * T, N, H), jnp.bfloat16), scaled),
        "decode": decode(every, Struct((B * T, N, H), jnp.bfloat16), operands),
        "decode contiguous": decode(lanes, Struct((4, T, N, H), jnp.bfloat16), plain),
    }
