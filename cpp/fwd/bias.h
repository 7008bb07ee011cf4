// The warps of the producer that bring the bias, one for each consumer warpgroup, and what it
// hides.
#pragma once

#include "common/softmax.h"
#include "fwd/load.h"
#include "fwd/params.h"
#include "fwd/traits.h"

namespace jax_fa3::fwd {

// Warps that neither load tiles nor schedule: most kernels have nothing for them to do.
template <class Traits>
CUTLASS_DEVICE void use_spare_warp(Traits, typename Traits::Params const& params,
                                   typename Traits::SharedStorage&, int) {
  use_spare_warp(Traits{}, params);
}

template <class Element, int kHeadDim, int kHeadDimV>
CUTLASS_DEVICE void use_spare_warp(
    Traits<Element, kHeadDim, kHeadDimV, Kind::kBias>, BiasParams const& params,
    typename Traits<Element, kHeadDim, kHeadDimV, Kind::kBias>::SharedStorage& storage,
    int warpgroup) {
  using Traits = Traits<Element, kHeadDim, kHeadDimV, Kind::kBias>;
  bool const elected = threadIdx.x % 32 == 0;
  PipelineState<Traits::kWorkStages> work_state;
  PipelineState<Traits::kBiasStages> state;
  for (;; work_state.advance()) {
    WorkTile const work = take_work(storage, work_state);
    if (work.last) return;
    if (!elected) continue;
    RowCoord const rows{work.tile.block * Traits::kBlockM + warpgroup * 64, work.tile.head,
                        work.tile.batch};
    for (int n_block = work.blocks.end - 1; n_block >= work.blocks.begin; --n_block) {
      load_bias<Traits::kBlockN>(params.bias, storage.bias_rings[warpgroup],
                                 storage.bias(warpgroup), state, n_block * Traits::kBlockN, rows);
    }
  }
}

// A row of which a bias or a dense mask hides every key sees nothing. One of scores that are NaN
// has no maximum either, but a sum.
CUTLASS_DEVICE void mark_hidden_rows(Softmax const& softmax, Interval (&rows)[kRowsPerThread]) {
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    float const sum = quad_sum(softmax.row_sum[row]);
    bool const sees = softmax.row_max[row] > softmax.exponents.lowest || sum != 0.f;
    if (!sees && !rows[row].broken()) rows[row] = {0, 0};
  }
}

}  // namespace jax_fa3::fwd
