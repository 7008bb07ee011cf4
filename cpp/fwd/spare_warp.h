// The warp of the producer that leaves something of each block of keys beside them: ALiBi's
// operand; with a bias by distance, what all scores of the block get, if that is the same.
#pragma once

#include "fwd/load.h"
#include "fwd/params.h"
#include "fwd/traits.h"

namespace jax_fa3::fwd {

// For each tile `begin`, for each of its blocks of keys what that gave, which takes the block and
// its stage.
template <class Traits, class Storage, class Begin>
CUTLASS_DEVICE void add_to_keys(Storage& storage, Begin const& begin) {
  PipelineState<Traits::kWorkStages> work_state;
  PipelineState<Traits::kStages> state;
  for (;; work_state.advance()) {
    WorkTile const work = take_work(storage, work_state);
    if (work.last) return;
    auto const add_to_block = begin(work.tile);
    for (int n_block = work.blocks.end - 1; n_block >= work.blocks.begin; --n_block) {
      storage.key_pipeline.empty[state.stage].wait(state.phase ^ 1);
      add_to_block(n_block, state.stage);
      if (threadIdx.x % 32 == 0) storage.key_pipeline.full[state.stage].arrive();
      state.advance();
    }
  }
}

template <class Element, int kHeadDim, int kHeadDimV>
CUTLASS_DEVICE void use_spare_warp(
    Traits<Element, kHeadDim, kHeadDimV, Kind::kAlibi>, AlibiParams const& params,
    typename Traits<Element, kHeadDim, kHeadDimV, Kind::kAlibi>::SharedStorage& storage,
    int index) {
  using Traits = Traits<Element, kHeadDim, kHeadDimV, Kind::kAlibi>;
  if (index > 0) return;
  begin_alibi<Traits::kBlockM, Traits::kBlockN, Traits::kStages>(storage.term_rows(),
                                                                 storage.term_keys());
  add_to_keys<Traits>(storage, [&](TileCoord const& tile) {
    float const slope = params.alibi.slope(tile.batch, tile.head);
    int const first_row = tile.block * Traits::kBlockM;
    return [=, &storage](int n_block, int stage) {
      write_alibi<Traits::kBlockN>(storage.term_keys() + stage * term_size(Traits::kBlockN, 1),
                                   -slope, first_row - n_block * Traits::kBlockN);
    };
  });
}

template <class Element, int kHeadDim, int kHeadDimV>
CUTLASS_DEVICE void use_spare_warp(
    Traits<Element, kHeadDim, kHeadDimV, Kind::kRelative>, RelativeParams const& params,
    typename Traits<Element, kHeadDim, kHeadDimV, Kind::kRelative>::SharedStorage& storage,
    int index) {
  using Traits = Traits<Element, kHeadDim, kHeadDimV, Kind::kRelative>;
  if (index > 0) return;
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  // As an exponent: the softmax rounds by no more than it does where scores are as large.
  constexpr float kMost = 256.f;
  float const most = kMost / params.exponents.softmax_scale_log2;
  add_to_keys<Traits>(storage, [&](TileCoord const& tile) {
    int const first_row = tile.block * kBlockM;
    int const last_row = min(first_row + kBlockM, params.mask.seqlen_q) - 1;
    return [=, &params, &storage](int n_block, int stage) {
      int const first_key = n_block * kBlockN;
      int const last_key = min(first_key + kBlockN, params.mask.seqlen_k) - 1;
      float const same = params.relative_bias.template same_of<kBlockM + kBlockN>(
          tile.batch, tile.head, first_key - last_row, last_key - first_row, most);
      if (threadIdx.x % 32 == 0) storage.same_term()[stage] = same;
    };
  });
}

}  // namespace jax_fa3::fwd
