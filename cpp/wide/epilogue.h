// The end of a tile: divide by the row sums, write half of the output's
// columns, and the log-sum-exp.
#pragma once

#include "fwd/epilogue.h"
#include "wide/traits.h"

namespace jax_fa3::wide {

// What the first warpgroup knows of the rows, for the second: an empty tile
// gives it nothing.
template <class Traits>
CUTLASS_DEVICE void share_rows(typename Traits::SharedStorage& storage, int half,
                               Softmax& softmax) {
  auto& rows = storage.rows;
  int const lane = threadIdx.x % 32;
  int const first = threadIdx.x % 128 / 32 * 16 + lane / 4;
  if (half == 0) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      float const sum = quad_sum(softmax.row_sum[row]);
      if (lane % 4 != 0) continue;
      rows.max[first + row * 8] = softmax.row_max[row];
      rows.sum[first + row * 8] = sum;
      rows.factor[first + row * 8] = softmax.factor[row];
      rows.offset[first + row * 8] = softmax.offset[row];
    }
    named_arrive(NamedBarrier::kRows, 0, 256);
  } else {
    named_sync(NamedBarrier::kRows, 0, 256);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      softmax.row_max[row] = rows.max[first + row * 8];
      // A thread's sum is of its own columns.
      softmax.row_sum[row] = lane % 4 == 0 ? rows.sum[first + row * 8] : 0.f;
      softmax.factor[row] = rows.factor[first + row * 8];
      softmax.offset[row] = rows.offset[first + row * 8];
    }
  }
}

template <class Traits, class Out>
CUTLASS_DEVICE void store(fwd::Params const& params, typename Traits::SharedStorage& storage,
                          TileCoord tile, int rank, int half,
                          Interval const (&rows)[kRowsPerThread], Softmax& softmax, Out& tOrO) {
  using Element = typename Traits::Element;
  constexpr int kColumns = Traits::kColumns;
  int const thread = threadIdx.x % 128;
  int const tile_row = tile.block * Traits::kBlockM + rank * Traits::kRows;
  int const warp_row = thread / 32 * 16;
  int const first_row = tile_row + warp_row + thread % 32 / 4;  // of this thread
  int const columns = params.head_dim_v - half * kColumns;
  int const seqlen_q = params.mask.seqlen_q;
  bool stored[kRowsPerThread] = {first_row < seqlen_q, first_row + 8 < seqlen_q};
  int64_t const index =
      (int64_t{tile.batch} * params.num_heads_q + tile.head) * seqlen_q + first_row;
  float* const lse_out = params.lse + index;
  fwd::Sink const sink = fwd::sink_of(params, tile);
  fwd::normalize<Element>(rows, params.softmax_scale, sink, softmax, tOrO);
  float lse[kRowsPerThread];
  fwd::find_lse(rows, params.softmax_scale, sink, softmax, lse);
  int64_t const offset = tile.batch * params.out_batch_stride + tile.head * params.out_head_stride +
                         half * kColumns;  // of out in fp32
  if (params.out_accum != nullptr) {
    fwd::accumulate(rows, params.out_accum + offset + first_row * params.out_seqlen_stride,
                    params.out_seqlen_stride, columns, lse_out, params.out_fp32 != nullptr, stored,
                    tOrO, lse);
    named_sync(NamedBarrier::kRows, 0, 256);  // both have read the log-sum-exp
  }
  if (params.out_fp32 != nullptr) {
    store_fp32(
        tOrO, params.out_fp32 + offset, params.out_seqlen_stride, first_row,
        [&](int i) { return stored[i]; }, columns);
  } else {
    // In Q's memory, which nobody reads any more: the weights of the last block
    // are there.
    uint16_t* const smem = storage.query + half * Traits::kRows * kColumns;
    auto const pair = [&](int i) { return pack<Element>(tOrO(2 * i), tOrO(2 * i + 1)); };
    stage_packed<Traits::kRows, kColumns, 64>(pair, smem, warp_row);
    tma_store_fence();
    named_sync(NamedBarrier::kOutOfWarpgroup0, half, 128);
    if (thread == 0 && columns > 0) {
      tma_store_rows<Traits::kRows, kColumns, 64>(
          params.out, smem, {tile_row, tile.head, tile.batch}, half * kColumns);
      tma_store_arrive();
      tma_store_wait<0>();
    }
  }

  if (half != 0 || thread % 4 != 0) return;
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    if (!stored[row]) continue;
    lse_out[row * 8] = lse[row];
    if (params.lse_low == nullptr) continue;
    float const low = fwd::find_lse_low(softmax, params.softmax_scale, sink, lse[row], row);
    params.lse_low[index + row * 8] = rows[row].empty() ? 0.f : low;
  }
}

}  // namespace jax_fa3::wide
