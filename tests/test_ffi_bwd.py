"""The backward's custom calls as they are lowered."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from lowering import lower, operations, targets
from test_ffi import CONFIG, OPERANDS, B, H, K, N, S, T, V, needs_kernels, struct

from jax_fa3 import _ffi, dot_product_attention
from jax_fa3._operands import Operands, Rows
from jax_fa3._problem import Config, Masks
from jax_fa3._targets import BWD, TARGETS


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("dtype", "name"), [(jnp.bfloat16, "bf16"), (jnp.float16, "f16")])
def test_bwd_operands_and_results(deterministic, dtype, name):
    """dq, dk, dv, then workspace: what is kept of a block of rows, intervals, their hulls, the sum of
    dq, turns, the ranges of fp16's dS, parts of dk and dv, and what is not
    there: gradients of sinks, of a bias and of slopes."""
    config = Config(0.5, (None, None), None, deterministic)
    operands = [struct(*x.shape, dtype=dtype) for x in OPERANDS]
    results = struct(B, T, N, V, dtype=dtype), struct(B, N, T, dtype=jnp.float32)

    def backward(q, k, v, *results):
        return _ffi.bwd(config, Operands(q, k, v), Masks(), Rows(*results))

    text = lower(backward, *operands, *results, *results, results[1])
    assert targets(text) == ["jax_fa3.bwd.v1"]
    assert operations(text) == {"custom_call", "broadcast_in_dim"}
    rows = f"2x16x4x128x{name}, 2x4x16xf32, " * 2 + "2x4x16xf32, 0xf32, "
    rows += f"0x{name}, 0xui32, 0xui32, 0xui32, 0xf32, 0xf32, 0xf32"
    shapes = f"2x16x4x192x{name}, 2x24x2x192x{name}, 2x24x2x128x{name}, "
    shapes += "2x4x2x196xf32, 2x128x2xi32, 2x3x8xi32, 2x4x128x192xf32, "
    shapes += f"{16 if deterministic else 0}xi32, {'2x2x3' if name == 'f16' else '0'}xi32, "
    shapes += "0xf32, 0xf32, 0xf32, 0xf32, 0xf32"
    given, made = (", ".join(f"tensor<{shape}>" for shape in x.split(", ")) for x in (rows, shapes))
    assert f", {given}) -> ({made})" in text


@needs_kernels
def test_bwd_in_parts():
    """Where few blocks of keys would leave most of the GPU idle, CTAs share the rows of each; where
    lengths are not known they do not."""
    assert _ffi._C is not None
    config = Config(0.5, (None, 0), None, False)

    def parts(length):
        q, kv = struct(1, length, 8, 128), struct(1, length, 1, 128)
        lse = struct(1, 8, length, dtype=jnp.float32)

        def backward(q, k, v, *rows):
            return _ffi.bwd(config, Operands(q, k, v), Masks(), Rows(*rows))

        text = lower(backward, q, kv, kv, q, lse, q, lse)
        (results,) = re.findall(r"custom_call @jax_fa3.bwd.v1\(.* -> \((.*)\)\n", text)
        return results.split(", ")[-5]

    splits = _ffi._C.bwd_splits((1, 8192, 8192, 8, 1, 128, 128), (2**62, 0), True, False)
    assert splits > 1 and parts(8192) == f"tensor<{splits}x1x8192x1x256xf32>"
    assert parts(jax.export.symbolic_shape("t")[0]) == "tensor<0xf32>"


@pytest.mark.parametrize("with_lse", [False, True])
def test_bwd_without_a_gradient_of_lse(with_lse):
    """Then nothing writes zeros for it: it is an array of no elements."""
    call = functools.partial(dot_product_attention, implementation="fa3", return_residual=with_lse)
    q, kv = struct(B, T, N, 64), struct(B, S, K, 64)

    def gradients(q, k, v):
        results, pullback = jax.vjp(call, q, k, v)
        return pullback(results)

    (types,) = re.findall(
        r"custom_call @jax_fa3.bwd.v1\(.*?: \((.*?)\) ->", lower(gradients, q, kv, kv)
    )
    place = [row.name for row in TARGETS[BWD].operands].index("dlse")
    wanted = f"{B}x{N}x{T}" if with_lse else "0"
    assert types.split(", ")[place] == f"tensor<{wanted}xf32>"


@pytest.mark.parametrize(("dim", "width"), [(40, 64), (128, 128), (192, 192)])
def test_bwd_of_parts_of_the_keys(dim, width):
    """dk and dv in fp32. The sum of dq stays in the workspace, where the next call continues it."""
    config = Config(0.5, (None, None), None, False, partial=True)
    q, kv, lse = struct(B, T, N, dim), struct(B, S, K, dim), struct(B, N, T, dtype=jnp.float32)

    def backward(q, k, v, *rows):
        call = functools.partial(_ffi.bwd, config, Operands(q, k, v), Masks(), Rows(None, *rows))
        return call(call(finish_dq=False)[0])

    text = lower(backward, q, kv, kv, lse, q, lse)
    assert operations(text) == {"custom_call", "output_operand_alias", "broadcast_in_dim"}
    summed = f"tensor<2x4x128x{width}xf32>"
    calls = re.findall(r"custom_call @jax_fa3.bwd.v1\(.*?: \((.*?)\) -> \((.*?)\)\n", text)
    operands, results = ([x.split(", ") for x in group] for group in zip(*calls, strict=True))
    assert [x[8] for x in operands] == ["tensor<0xbf16>"] * 2  # out
    assert [x[12:14] for x in operands] == [["tensor<0xf32>"] * 2, ["tensor<0xf32>", summed]]
    assert [x[0] for x in results] == ["tensor<0xbf16>", f"tensor<2x16x4x{dim}xbf16>"]
    assert all(x[1:3] == [f"tensor<2x24x2x{dim}xf32>"] * 2 and x[6] == summed for x in results)
    aliases = r"output_tuple_indices = \[6\], operand_index = 13"
    assert len(re.findall(aliases, text)) == text.count("output_operand_alias<") == 1


def test_bwd_of_packed_is_one_gradient():
    qkv = struct(B, T, N + 2 * K, H)
    results = struct(B, T, N, H), struct(B, N, T, dtype=jnp.float32)

    def backward(qkv, *results):
        return _ffi.bwd(CONFIG, Operands(qkv, packed=(N, K)), Masks(), Rows(*results))

    text = lower(backward, qkv, *results, *results)
    assert targets(text) == ["jax_fa3.bwd_packed.v1"]
    assert operations(text) == {"custom_call", "broadcast_in_dim"}
    assert "-> (tensor<2x16x8x192xbf16>, " in text


@needs_kernels
@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 129, 4096])
@pytest.mark.parametrize("finish_dq", [True, False])
def test_bwd_workspace_is_large_enough(head_dim, length, finish_dq):
    config = Config(0.5, (None, None), None, True)
    half = functools.partial(struct, dtype=jnp.float16)  # which needs all of it
    q, lse = half(B, length, N, head_dim), struct(B, N, length, dtype=jnp.float32)
    kv = half(B, S, K, head_dim)

    def backward(q, k, v, *results):
        operands = Operands(q, k, v)
        return _ffi.bwd(config, operands, Masks(), Rows(*results), finish_dq=finish_dq)

    text = lower(backward, q, kv, kv, q, lse, q, lse)
    made = re.findall(r"tensor<([\dx]+)x(?:f32|i32)>", text[text.rindex("-> (") :])
    sizes = [math.prod(map(int, shape.split("x"))) for shape in made[:6]]
    built = [(h, v) for name, h, v in _ffi.kernels() if name == "float16"]
    kernel = next(h for h, v in built if h >= head_dim and v >= head_dim)
    assert _ffi._C is not None
    needed = _ffi._C.bwd_workspace(B, length, N, K, kernel, not finish_dq)
    assert all(x >= y for x, y in zip(sizes, needed, strict=True))
