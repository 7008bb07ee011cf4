// The warp of the producer that writes ALiBi's operand of each block of keys.
#pragma once

#include "fwd/load.h"
#include "fwd/params.h"
#include "fwd/traits.h"

namespace jax_fa3::fwd {

template <class Element, int kHeadDim, int kHeadDimV>
CUTLASS_DEVICE void use_spare_warp(
    Traits<Element, kHeadDim, kHeadDimV, Kind::kAlibi>, AlibiParams const& params,
    typename Traits<Element, kHeadDim, kHeadDimV, Kind::kAlibi>::SharedStorage& storage,
    int index) {
  using Traits = Traits<Element, kHeadDim, kHeadDimV, Kind::kAlibi>;
  if (index > 0) return;
  begin_alibi<Traits::kBlockM, Traits::kBlockN, Traits::kStages>(storage.term_rows(),
                                                                 storage.term_keys());
  PipelineState<Traits::kWorkStages> work_state;
  PipelineState<Traits::kStages> state;
  for (;; work_state.advance()) {
    WorkTile const work = take_work(storage, work_state);
    if (work.last) return;
    float const slope = params.alibi.slope(work.tile.batch, work.tile.head);
    int const first_row = work.tile.block * Traits::kBlockM;
    for (int n_block = work.blocks.end - 1; n_block >= work.blocks.begin; --n_block) {
      storage.key_pipeline.empty[state.stage].wait(state.phase ^ 1);
      write_alibi<Traits::kBlockN>(
          storage.term_keys() + state.stage * term_size(Traits::kBlockN, 1), -slope,
          first_row - n_block * Traits::kBlockN);
      if (threadIdx.x % 32 == 0) storage.key_pipeline.full[state.stage].arrive();
      state.advance();
    }
  }
}

}  // namespace jax_fa3::fwd
