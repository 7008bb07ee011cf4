// How a tile's results leave the FP8 kernel: while the next tile's S is computed, so with few
// registers, for which one piece of code does better than the forward's parts.
#pragma once

#include "fp8/warpgroup_mma.h"
#include "fwd/epilogue.h"

namespace jax_fa3::fp8 {

// Addresses and intervals of rows are found where they are needed, for the same reason.
template <class Traits, class Out>
CUTLASS_DEVICE void store(Params const& params, typename Traits::SharedStorage& storage,
                          TileCoord tile, int warpgroup, typename Traits::Softmax& softmax,
                          Out& tOrO) {
  int const seqlen_q = params.mask.seqlen_q;
  auto const find_first_row = [&] {  // of this thread
    int const thread = thread_index() % 128;
    return tile.block * Traits::kBlockM + warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
  };
  {
    float inverse_sum[kRowsPerThread];
    fwd::sum_rows<typename Traits::Element>(params.softmax_scale, fwd::sink_of(params, tile),
                                            softmax, inverse_sum);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); ++i) {
      tOrO(i) = tOrO(i) * inverse_sum[fragment_row(i)] * softmax.out_scale;
    }
  }
  auto const& rows = rows_of_thread(storage);
  if (__any_sync(~0u, rows[0].empty() | rows[1].empty())) {  // seldom
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); ++i) {
      int const row = fragment_row(i);
      if (rows[row].empty()) tOrO(i) = fwd::out_of_empty(rows[row]);
    }
  }
  if (params.out_fp32 != nullptr) {
    int const first_row = find_first_row();
    int64_t const offset =
        tile.batch * params.out_batch_stride + tile.head * params.out_head_stride;
    store_fp32(
        tOrO, params.out_fp32 + offset, params.out_seqlen_stride, first_row,
        [&](int i) { return first_row + i * 8 < seqlen_q; }, params.head_dim_v);
  } else {
    // The previous tile's has read the buffer.
    if (thread_index() % 128 == 0) tma_store_wait<0>();
    cutlass::arch::NamedBarrier::sync(
        128, fwd::barrier_id(fwd::NamedBarrier::kOutOfWarpgroup0, warpgroup));
    fwd::store_in_16_bits<Traits>(params, tile, warpgroup, storage.out(warpgroup), tOrO);
  }
  // After the output, so that its store is under way meanwhile.
  float lse[kRowsPerThread];
  fwd::find_lse(rows_of_thread(storage), params.softmax_scale, fwd::sink_of(params, tile), softmax,
                lse);
  if (thread_index() % 4 != 0) return;
  int const first_row = find_first_row();
  float* const lse_out =
      params.lse + (int64_t{tile.batch} * params.num_heads_q + tile.head) * seqlen_q + first_row;
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    if (first_row + row * 8 < seqlen_q) lse_out[row * 8] = lse[row];
  }
}

}  // namespace jax_fa3::fp8
