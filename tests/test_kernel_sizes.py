"""The one list of kernels as CMake, C++ and Python read it: they must not disagree, or workspace would
be too small for a kernel."""

import pytest

from jax_fa3 import _ffi
from jax_fa3 import _kernel_sizes as sizes

ALL = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
ALL += [(64, 512), (512, 512), (576, 512)]


def test_kernels():
    """Of the default build. What a user can count on, so not taken from the list."""
    fp8 = [("float8_e4m3fn", dim, dim) for dim in (64, 128, 256)]
    assert sizes.KERNELS == [(dtype, *x) for dtype in ("bfloat16", "float16") for x in ALL] + fp8


@pytest.mark.skipif(_ffi._C is None, reason="Python-only install")
class TestCompiled:
    """Against the compiled module."""

    def test_kernels(self):
        """Those built are of the list, in its order."""
        assert _ffi._C is not None
        built = _ffi._C.kernels()
        dtypes, head_dims = {dtype for dtype, _, _ in built}, {h for _, h, _ in built}
        assert built == [x for x in sizes.KERNELS if x[0] in dtypes and x[1] in head_dims]

    @pytest.mark.parametrize("head_dim", range(8, 513, 8))
    def test_tiles_of_the_backward(self, head_dim):
        assert _ffi._C is not None
        found = sizes.bwd_tile(head_dim)
        assert _ffi._C.bwd_tile(head_dim) == found
        assert found.head_dim >= head_dim
        assert found.block_m >= sizes.BWD_FEWEST_ROWS
        assert sizes.BWD_ROWS % found.block_m == sizes.BWD_ROWS % _ffi._C.bwd_query_rows == 0
