// The producer of the FP8 forward: as in fwd/load.h, but K and V share a ring, and V is transposed
// and clean.
#pragma once

#include "common/tma.h"
#include "fp8/traits.h"

namespace jax_fa3::fp8 {

template <int kHeadDim>
CUTLASS_DEVICE void load(Traits<kHeadDim>, Params const& params,
                         typename Traits<kHeadDim>::SharedStorage& storage) {
  using Traits = Traits<kHeadDim>;
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  constexpr auto kKeep = TMA::CacheHintSm90::EVICT_LAST;       // K and V: read by many tiles
  constexpr auto kReadOnce = TMA::CacheHintSm90::EVICT_FIRST;  // Q
  if (threadIdx.x % 32 != 0) return;
  PipelineState<Traits::kWorkStages> work_state;
  PipelineState<Traits::kStages> state;
  uint32_t query_phase = 0;
  auto const raw = [](FullBarrier& barrier) { return reinterpret_cast<uint64_t*>(&barrier); };

  for (;; work_state.advance()) {
    storage.work_pipeline.full[work_state.stage].wait(work_state.phase);
    fwd::Work const work = storage.work[work_state.stage];
    storage.work_pipeline.empty[work_state.stage].arrive();
    if (work.last) return;
    int const batch = work.tile.batch;
    int const head_k = work.tile.head / params.group;
    BlockRange const blocks = work.blocks;
    if (blocks.begin >= blocks.end) continue;

    // What a step reads: K of a block and V of the one after it, where there are such.
    auto const load_step = [&](int key_block, int value_block) {
      auto& pipeline = storage.step_pipeline;
      FullBarrier& full = pipeline.full[state.stage];
      pipeline.empty[state.stage].wait(state.phase ^ 1);
      bool const has_key = key_block >= blocks.begin;
      bool const has_value = value_block < blocks.end;
      full.arrive_and_expect_tx((has_key + has_value) * Traits::kSizeK);
      if (has_key) {
        tma_load_rows<kBlockN, kHeadDim, Traits::kSlab>(params.key, raw(full), kKeep,
                                                        storage.key + state.stage * Traits::kSizeK,
                                                        key_block * kBlockN, head_k, batch);
      }
      if (has_value) {
        SM90_TMA_LOAD_4D::copy(&params.value, raw(full), static_cast<uint64_t>(kKeep),
                               storage.value + state.stage * Traits::kSizeK, value_block * kBlockN,
                               0, head_k, batch);
      }
      state.advance();
    };

    load_step(blocks.end - 1, blocks.end);
    for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
      storage.query_empty[warpgroup].wait(query_phase ^ 1);
      FullBarrier& full = storage.query_full[warpgroup];
      full.arrive_and_expect_tx(64 * kHeadDim);
      tma_load_rows<kBlockM, kHeadDim, Traits::kSlab>(
          params.query, raw(full), kReadOnce, storage.query + warpgroup * 64 * Traits::kSlab,
          work.tile.m_block * kBlockM + warpgroup * 64, work.tile.head, batch);
    }
    query_phase ^= 1;
    for (int n_block = blocks.end - 2; n_block >= blocks.begin - 1; --n_block) {
      load_step(n_block, n_block + 1);
    }
  }
}

}  // namespace jax_fa3::fp8
