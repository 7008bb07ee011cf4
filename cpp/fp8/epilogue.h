// How a tile's results leave the FP8 kernel: while the next tile's S is computed, so with few
// registers, for which one piece of code does better than the forward's parts.
#pragma once

#include "fp8/traits.h"
#include "fwd/epilogue.h"

namespace jax_fa3::fp8 {

template <class Traits, class Out>
CUTLASS_DEVICE void store(Params const& params, typename Traits::SharedStorage& storage,
                          TileCoord tile, int warpgroup, Interval const (&rows)[kRowsPerThread],
                          typename Traits::Softmax& softmax, Out& tOrO) {
  int const thread = threadIdx.x % 128;
  int const first_row = tile.block * Traits::kBlockM + warpgroup * 64 + thread / 32 * 16 +
                        thread % 32 / 4;  // of this thread
  int const seqlen_q = params.mask.seqlen_q;
  bool const stored[kRowsPerThread] = {first_row < seqlen_q, first_row + 8 < seqlen_q};
  int64_t const index =
      (int64_t{tile.batch} * params.num_heads_q + tile.head) * seqlen_q + first_row;
  float* const lse_out = params.lse + index;
  {
    float inverse_sum[kRowsPerThread];
    fwd::sum_rows<typename Traits::Element>(params.softmax_scale, fwd::sink_of(params, tile),
                                            softmax, inverse_sum);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); ++i) {
      tOrO(i) = tOrO(i) * inverse_sum[fragment_row(i)] * softmax.out_scale;
    }
  }
  bool const sees_nothing[kRowsPerThread] = {rows[0].empty(), rows[1].empty()};
  if (__any_sync(~0u, sees_nothing[0] | sees_nothing[1])) {  // seldom
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); ++i) {
      int const row = fragment_row(i);
      if (sees_nothing[row]) tOrO(i) = fwd::out_of_empty(rows[row]);
    }
  }
  if (params.out_fp32 != nullptr) {
    int64_t const offset =
        tile.batch * params.out_batch_stride + tile.head * params.out_head_stride;
    store_fp32(
        tOrO, params.out_fp32 + offset, params.out_seqlen_stride, first_row,
        [&](int i) { return stored[i]; }, params.head_dim_v);
  } else {
    if (thread == 0) tma_store_wait<0>();  // the previous tile's has read the buffer
    cutlass::arch::NamedBarrier::sync(
        128, fwd::barrier_id(fwd::NamedBarrier::kOutOfWarpgroup0, warpgroup));
    fwd::store_in_16_bits<Traits>(params, tile, warpgroup, storage.out(warpgroup), tOrO);
  }
  // After the output, so that its store is under way meanwhile.
  float lse[kRowsPerThread];
  fwd::find_lse(rows, params.softmax_scale, fwd::sink_of(params, tile), softmax, lse);
  if (thread % 4 != 0) return;
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    if (stored[row]) lse_out[row * 8] = lse[row];
  }
}

}  // namespace jax_fa3::fp8
