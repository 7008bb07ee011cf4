// A gradient of 64 rows, from the registers of a warpgroup to global memory.
#pragma once

#include "bwd/barriers.h"
#include "bwd/params.h"
#include "bwd/traits.h"
#include "common/fragment.h"
#include "common/tma.h"

namespace jax_fa3::bwd {

// The rows of a gradient that a warpgroup holds.
struct GradRows {
  RowCoord tile;  // its first row in the array
  int seqlen;     // rows of the array
  int first = 0;  // the warpgroup's first row in the tile

  CUTLASS_DEVICE int of_thread() const {
    return tile.row + first + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  }
};

template <class Traits>
CUTLASS_DEVICE GradRows rows_of_keys(Params const& params, KeyTile const& tile, int first = 0) {
  return {{tile.n_block * Traits::kBlockN, tile.head_k, tile.batch}, params.mask.seqlen_k, first};
}

template <class Fragment>
CUTLASS_DEVICE void store_grad_fp32(Fragment const& grad, Operand const& out, GradRows const& rows,
                                    int columns) {
  float* const head = static_cast<float*>(out.data) + rows.tile.batch * out.batch_stride +
                      rows.tile.head * out.head_stride;
  int const first = rows.of_thread();
  auto const exists = [&](int i) { return first + i * 8 < rows.seqlen; };
  store_fp32(grad, head, out.seqlen_stride, first, exists, columns);
}

// `smem` holds the tile's kRows rows. Other warpgroups do not touch this one's any more.
template <class Element, int kRows, int kColumns, class Fragment>
CUTLASS_DEVICE void store_grad(Fragment const& grad, CUtensorMap const& map, uint16_t* smem,
                               GradRows const& rows, BarrierId barrier) {
  constexpr int kSlab = slab(kColumns);
  int const thread = threadIdx.x % 128;
  stage_packed<kRows, kColumns, kSlab>(packed<Element>(grad), smem, rows.first + thread / 32 * 16);
  cute::tma_store_fence();
  cutlass::arch::NamedBarrier::sync(128, barrier);
  if (thread == 0) {
    tma_store_rows<kRows, kColumns, kSlab>(
        map, smem + rows.first * kSlab,
        {rows.tile.row + rows.first, rows.tile.head, rows.tile.batch});
    cute::tma_store_arrive();
  }
}

// dK and dV of a warpgroup's 64 keys where a tile comes after this one. They leave one after the
// other from memory of the warpgroup's own, so that it does not wait for the other one.
template <class Traits, class Fragment, class FragmentV>
CUTLASS_DEVICE void store_grads(Params const& params, typename Traits::SharedStorage& storage,
                                GradRows rows, int warpgroup, BarrierId barrier,
                                Fragment const& tdK, FragmentV const& tdV) {
  using Element = typename Traits::Element;
  static_assert(64 * in_slabs(Traits::kHeadDimV) <= Traits::kSizeGrads);
  uint16_t* const memory = storage.grads + warpgroup * Traits::kSizeGrads;
  rows.tile.row += rows.first;
  rows.first = 0;
  auto const wait_until_read = [&] {
    if (threadIdx.x % 128 == 0) cute::tma_store_wait<0>();
    cutlass::arch::NamedBarrier::sync(128, barrier);
  };
  wait_until_read();  // those of the tile before
  store_grad<Element, 64, Traits::kHeadDimV>(tdV, params.dvalue, memory, rows, barrier);
  wait_until_read();
  store_grad<Element, 64, Traits::kHeadDim>(tdK, params.dkey, memory, rows, barrier);
}

// Gradients that a warpgroup holds transposed: rows of its accumulators, 64 after 64, are columns
// of the gradient. Calls f with each of the thread's elements and its place in the fp32 array.
template <class Fragment, class F>
CUTLASS_DEVICE void for_each_transposed(Fragment& grad, Operand const& out, GradRows const& rows,
                                        int columns, F const& f) {
  constexpr int kOfBlock = decltype(size<0>(grad))::value;  // elements of 64 columns
  constexpr int kBlocks = decltype(size<1>(grad))::value;
  int const first_column = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  int const first_row = rows.tile.row + threadIdx.x % 4 * 2;
  float* row = static_cast<float*>(out.data) + rows.tile.batch * out.batch_stride +
               rows.tile.head * out.head_stride + first_row * out.seqlen_stride + first_column;
  int rows_left = rows.seqlen - first_row;
  int columns_left = columns - first_column;
  // Or what is the same each time is computed before the steps, and spilled.
  asm volatile("" : "+r"(rows_left), "+r"(columns_left));
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kOfBlock; i += i % 2 == 0 ? 1 : 3) {
    asm volatile("" : "+l"(row));
    if (fragment_column(i) < rows_left) {
      CUTLASS_PRAGMA_UNROLL
      for (int block = 0; block < kBlocks; ++block) {
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) {
          int const column = block * 64 + r * 8;
          if (column < columns_left) f(grad(block * kOfBlock + i + r * 2), row[column]);
        }
      }
    }
    row += (i % 2 == 0 ? 1 : 7) * out.seqlen_stride;
  }
}

template <class Fragment>
CUTLASS_DEVICE void store_transposed_fp32(Fragment const& grad, Operand const& out,
                                          GradRows const& rows, int columns) {
  for_each_transposed(grad, out, rows, columns, [](float x, float& place) { place = x; });
}

// `smem` holds the tile's kRows rows, which all other warpgroups have read.
template <class Element, int kRows, int kColumns, class Fragment>
CUTLASS_DEVICE void store_transposed_grad(Fragment const& grad, CUtensorMap const& map,
                                          uint16_t* smem, GradRows const& rows, BarrierId barrier) {
  constexpr int kSlab = slab(kColumns);
  constexpr int kOfBlock = decltype(size<0>(grad))::value;
  int const thread = threadIdx.x % 128;
  Tensor all = packed<Element>(grad);
  CUTLASS_PRAGMA_UNROLL
  for (int block = 0; block < kColumns / 64; ++block) {
    auto const of_block = [&](int i) { return all(block * kOfBlock / 2 + i); };
    stage_transposed<kRows, kSlab>(of_block, smem, block * 64 + thread / 32 * 16);
  }
  cute::tma_store_fence();
  cutlass::arch::NamedBarrier::sync(128, barrier);
  if (thread == 0) {
    tma_store_rows<kRows, kColumns, kSlab>(map, smem, rows.tile);
    cute::tma_store_arrive();
  }
}

template <class Fragment>
CUTLASS_DEVICE void scale_grad(Fragment& grad, float scale) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(grad); ++i) grad(i) *= scale;
}

}  // namespace jax_fa3::bwd
