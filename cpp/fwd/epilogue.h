// The end of a tile: divide by the row sums, write the output and the log-sum-exp.
#pragma once

#include <cute/arch/copy_sm90.hpp>

#include "common/softmax.h"
#include "common/tma.h"
#include "fwd/params.h"
#include "fwd/traits.h"

namespace jax_fa3::fwd {

// Rows that see no key get 0 and -inf, broken rows (mask.h) NaN, whatever was accumulated: a row
// without keys may have run through blocks that are full for its neighbours.
template <class Out>
CUTLASS_DEVICE void finalize(Interval const (&rows)[kRowsPerThread], float softmax_scale,
                             Softmax const& softmax, Out& tOrO, float (&lse)[kRowsPerThread]) {
  float inverse_sum[kRowsPerThread];
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    float const sum = quad_sum(softmax.row_sum[row]);
    inverse_sum[row] = 1.f / sum;
    lse[row] = softmax.row_max[row] * softmax_scale + logf(sum);
    if (rows[row].empty()) lse[row] = rows[row].broken() ? NAN : -INFINITY;
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(tOrO); ++i) {
    int const row = fragment_row(i);
    tOrO(i) *= inverse_sum[row];
    if (rows[row].empty()) tOrO(i) = rows[row].broken() ? NAN : 0.f;
  }
}

// Registers to shared memory in the swizzled slabs that TMA stores from: each warp its 16 rows.
template <class Traits, class Out>
CUTLASS_DEVICE void stage_out(Out const& tOrO, uint16_t* smem, int warp) {
  constexpr int kSlab = Traits::kSlabV;
  int const lane = threadIdx.x % 32;
  int const row = warp * 16 + lane % 16;
  // 16-byte vectors are permuted within a row by the row's index: over 8 rows of 128 bytes, over
  // 4 pairs of rows of 64 bytes.
  int const swizzle = kSlab == 64 ? row % 8 : row / 2 % 4;
  CUTLASS_PRAGMA_UNROLL
  for (int column = 0; column < Traits::kHeadDimV; column += 16) {
    uint32_t packed[4];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      packed[i] =
          pack<typename Traits::Element>(tOrO(column / 2 + 2 * i), tOrO(column / 2 + 2 * i + 1));
    }
    // Lanes 0-15 address the first 8 columns of 16 rows, lanes 16-31 the other 8.
    int const vector = (column % kSlab) / 8 + lane / 16;
    auto* const target = reinterpret_cast<uint128_t*>(
        smem + column / kSlab * (Traits::kBlockM * kSlab) + row * kSlab + (vector ^ swizzle) * 8);
    SM90_U32x4_STSM_N::copy(packed[0], packed[1], packed[2], packed[3], *target);
  }
}

// Straight from registers, for fp32 partial results.
template <class Out>
CUTLASS_DEVICE void store_out_fp32(Params const& params, TileCoord tile, int first_row,
                                   Out const& tOrO) {
  float* const out =
      params.out_fp32 + tile.batch * params.out_batch_stride + tile.head * params.out_head_stride;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(tOrO); i += 2) {
    int const row = first_row + fragment_row(i) * 8;
    int const column = fragment_column(i) + threadIdx.x % 4 * 2;
    if (row < params.mask.seqlen_q && column < params.head_dim_v) {
      *reinterpret_cast<float2*>(out + row * params.out_seqlen_stride + column) =
          float2{tOrO(i), tOrO(i + 1)};
    }
  }
}

template <class Traits, class Out>
CUTLASS_DEVICE void store(Params const& params, typename Traits::SharedStorage& storage,
                          TileCoord tile, int warpgroup, Interval const (&rows)[kRowsPerThread],
                          Softmax& softmax, Out& tOrO) {
  int const thread = threadIdx.x % 128;
  int const first_row = tile.m_block * Traits::kBlockM + warpgroup * 64 + thread / 32 * 16 +
                        thread % 32 / 4;  // of this thread
  float lse[kRowsPerThread];
  finalize(rows, params.softmax_scale, softmax, tOrO, lse);

  if (params.out_fp32 != nullptr) {
    store_out_fp32(params, tile, first_row, tOrO);
    if constexpr (Traits::kOutOverValue) {
      if (thread % 32 == 0) storage.out_stored.arrive();
    }
  } else {
    uint32_t const barrier = barrier_id(NamedBarrier::kOutOfWarpgroup0, warpgroup);
    uint16_t* const smem = storage.out() + warpgroup * 64 * Traits::kSlabV;
    if constexpr (Traits::kOutOverValue) {
      cutlass::arch::NamedBarrier::sync(Traits::kConsumerThreads,
                                        barrier_id(NamedBarrier::kValueRead));
    } else {
      // The previous tile's store has read the buffer.
      if (thread == 0) tma_store_wait<0>();
      cutlass::arch::NamedBarrier::sync(128, barrier);
    }
    stage_out<Traits>(tOrO, smem, thread / 32);
    tma_store_fence();
    cutlass::arch::NamedBarrier::sync(128, barrier);
    if (thread == 0) {
      tma_store_rows<Traits::kBlockM, Traits::kHeadDimV, Traits::kSlabV>(
          params.out, smem, tile.m_block * Traits::kBlockM + warpgroup * 64, tile.head, tile.batch);
      tma_store_arrive();
    }
    if constexpr (Traits::kOutOverValue) {
      if (thread == 0) tma_store_wait<0>();
      if (thread % 32 == 0) storage.out_stored.arrive();
    }
  }

  if (thread % 4 == 0) {
    int64_t const head = int64_t{tile.batch} * params.num_heads_q + tile.head;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      int const index = first_row + row * 8;
      if (index < params.mask.seqlen_q) params.lse[head * params.mask.seqlen_q + index] = lse[row];
    }
  }
}

}  // namespace jax_fa3::fwd
