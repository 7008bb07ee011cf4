// The consumers of the tangent kernel. The kernel itself is the forward's (fwd/kernel.h).
#pragma once

#include "fwd/kernel.h"
#include "jvp/epilogue.h"
#include "jvp/load.h"
#include "jvp/mma.h"

namespace jax_fa3::jvp {

template <class Element, int kHeadDim>
CUTLASS_DEVICE void consume(Traits<Element, kHeadDim>, Params const& params,
                            typename Traits<Element, kHeadDim>::SharedStorage& storage,
                            int warpgroup) {
  using Traits = Traits<Element, kHeadDim>;
  fwd::Turns<Traits::kPingPong ? Traits::kConsumerWarpgroups : 1> const turns{warpgroup};
  typename Traits::ConsumerState state;
  Tensor tOrO =
      partition_fragment_C(typename Traits::MmaPV{}, Shape<Int<Traits::kBlockM>, Int<kHeadDim>>{});
  int const tile_row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;

  turns.start();
  for (;; state.work.advance()) {
    WorkTile const work = fwd::take_work(storage, state.work);
    if (work.last) break;

    Interval intervals[kRowsPerThread];
    Rows rows;
    int const first_row = work.tile.block * Traits::kBlockM + tile_row;
    auto const find_rows = [&] {
      int64_t const index =
          (int64_t{work.tile.batch} * params.num_heads_q + work.tile.head) * params.mask.seqlen_q;
      CUTLASS_PRAGMA_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) {
        int const row = first_row + r * 8;
        intervals[r] = params.mask.row_interval(work.tile.batch, row);
        bool const sees = !intervals[r].empty();
        rows.lse[r] = sees ? __fmul_rn(params.lse[index + row], kLog2E) : INFINITY;
        rows.lse_low[r] = sees && params.lse_low != nullptr ? params.lse_low[index + row] : 0.f;
      }
    };
    if (work.blocks.begin < work.blocks.end) {
      mma<Traits>(params, storage, state, turns, work, find_rows, intervals, rows, tOrO);
    } else {
      find_rows();
    }
    store<Traits>(params, work.tile, first_row, intervals, rows, tOrO);
  }
}

}  // namespace jax_fa3::jvp
