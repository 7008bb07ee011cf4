// dq_accum, fp32 in the order of the accumulators, to the gradient.
#pragma once

#include "bwd/epilogue.h"
#include "bwd/range.h"
#include "bwd/rows.h"

namespace jax_fa3::bwd {

// Whether the gradient of a row's results (dO, dlse) is other than 0.
CUTLASS_DEVICE bool has_cotangent(Params const& params, int batch, int head, int row) {
  int64_t const index = (int64_t{batch} * params.num_heads_q + head) * params.mask.seqlen_q + row;
  bool found = params.dlse != nullptr && params.dlse[index] != 0.f;
  for (int column = 0; column < params.head_dim_v; column += 8) {
    uint4 const vector = load_vector(params.dout_rows, batch, row, head, column);
    found |= ((vector.x | vector.y | vector.z | vector.w) & 0x7fff7fffu) != 0;
  }
  return found;
}

// Rows of a broken segment (mask.h) get NaN, if a gradient came in for them. The thread's rows are
// `row` and `row` + 8.
template <class Fragment>
CUTLASS_DEVICE void mark_broken_rows(Params const& params, int batch, int head, int row,
                                     Fragment& grad) {
  CUTLASS_PRAGMA_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    if (!params.mask.row_interval(batch, row + r * 8).broken() ||
        !has_cotangent(params, batch, head, row + r * 8)) {
      continue;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(grad); ++i) {
      if (fragment_row(i) == r) grad(i) = NAN;
    }
  }
}

// The thread's elements of a warpgroup's tile in dq_accum: all threads' first 16 bytes, then all
// threads' next. It takes every 128th float4 from here on.
CUTLASS_DEVICE float4* accum_of_thread(float* of_warpgroup) {
  return reinterpret_cast<float4*>(of_warpgroup) + threadIdx.x % 128;
}

template <class Fragment>
CUTLASS_DEVICE void add_accum(float4 const* sum, Fragment& grad) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(grad); i += 4) {
    float4 const vector = sum[i / 4 * 128];
    grad(i) += vector.x;
    grad(i + 1) += vector.y;
    grad(i + 2) += vector.z;
    grad(i + 3) += vector.w;
  }
}

// One CTA per block of query rows and head, its threads where those of the main kernel were. The
// last first: what the main kernel wrote last may still be in the L2 cache.
template <class Traits>
__global__ void __launch_bounds__(Traits::kConsumerThreads)
    postprocess_kernel(__grid_constant__ Params const params) {
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kColumns = Traits::kColumnsdQ;
  __shared__ alignas(1024) uint16_t memory[Traits::kSizeQ];
  int const block = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  int const m_block = block % params.num_m_blocks;
  int const head = block / params.num_m_blocks % params.num_heads_q;
  int const batch = block / params.num_m_blocks / params.num_heads_q;
  int const warpgroup = threadIdx.x / 128;

  Tensor grad = make_tensor<float>(Int<Traits::kSizedQ / Traits::kConsumerThreads>{});
  clear(grad);
  using Stats = RowStats<kBlockM>;
  int64_t const index = params.m_block_index(batch, head, m_block);
  add_accum(
      accum_of_thread(params.dq_accum + index * Traits::kSizedQ + warpgroup * Traits::kSizedQ / 2),
      grad);
  // Which nobody has written where no key sees the rows.
  if (__float_as_int(params.row_stats[index * Stats::kSize + Stats::kSum]) != kSumHeld) clear(grad);
  // The warpgroups share the rows, or the columns.
  int const first_row = Traits::kWarpgroupsM == 2 ? warpgroup * 64 : 0;
  int const first_column = Traits::kWarpgroupsM == 2 ? 0 : warpgroup * kColumns;
  mark_broken_rows(
      params, batch, head,
      m_block * kBlockM + first_row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4, grad);
  scale_grad(grad, params.softmax_scale /
                       ds_scale<typename Traits::Element>(params, batch, head / params.group));

  constexpr int kSlab = slab(Traits::kHeadDim);
  if constexpr (Traits::kFourSlabs) {
    int const warp_row = first_row + threadIdx.x % 128 / 32 * 16;
    Tensor first = packed<typename Traits::Element>(grad);
    auto const rest = [&](int i) { return first(32 / 4 + i); };
    stage_packed<kBlockM, 32, kSlab>(first, memory, warp_row, warpgroup * 32);
    stage_packed<kBlockM, kColumns - 32, kSlab>(rest, memory, warp_row,
                                                warpgroup == 0 ? 64 : Traits::kFourthSlab);
  } else {
    stage_packed<kBlockM, kColumns, kSlab>(packed<typename Traits::Element>(grad), memory,
                                           first_row + threadIdx.x % 128 / 32 * 16, first_column);
  }
  tma_store_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int box = 0; box < kBlockM; box += 64) {
      tma_store_rows<kBlockM, Traits::kHeadDim, kSlab>(params.dquery, memory + box * kSlab,
                                                       {m_block * kBlockM + box, head, batch});
    }
    tma_store_arrive();
    tma_store_wait<0>();
  }
}

}  // namespace jax_fa3::bwd
