// The end of a tile of the main kernel: dK or dV of 64 keys, from registers to global memory.
#pragma once

#include "bwd/params.h"
#include "bwd/traits.h"
#include "common/fragment.h"
#include "common/tma.h"

namespace jax_fa3::bwd {

// `smem` holds the tile's kRows rows, of which the warpgroup's begin at `first_row`; `row` is the
// array's row of the tile's first. Other warpgroups do not touch these rows any more.
template <class Element, int kRows, int kColumns, class Fragment>
CUTLASS_DEVICE void store_grad(Fragment& grad, float scale, CUtensorMap const& map,
                               Operand const& fp32, bool is_fp32, uint16_t* smem, int first_row,
                               int row, int head, int batch, int rows, int columns,
                               BarrierId barrier) {
  constexpr int kSlab = slab(kColumns);
  int const thread = threadIdx.x % 128;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(grad); ++i) grad(i) *= scale;
  if (is_fp32) {
    float* const out =
        static_cast<float*>(fp32.data) + batch * fp32.batch_stride + head * fp32.head_stride;
    int const index = row + first_row + thread / 32 * 16 + thread % 32 / 4;
    auto const exists = [&](int i) { return index + i * 8 < rows; };
    store_fp32(grad, out, fp32.seqlen_stride, index, exists, columns);
    return;
  }
  stage_packed<kRows, kColumns, kSlab>(packed<Element>(grad), smem, first_row + thread / 32 * 16);
  cute::tma_store_fence();
  cutlass::arch::NamedBarrier::sync(128, barrier);
  if (thread == 0) {
    tma_store_rows<kRows, kColumns, kSlab>(map, smem + first_row * kSlab, row + first_row, head,
                                           batch);
    cute::tma_store_arrive();
  }
}

}  // namespace jax_fa3::bwd
