// The producer of the FP8 forward: as in fwd/load.h, but V is transposed and clean.
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
  PipelineState<Traits::kStages> key_state;
  PipelineState<Traits::kStages> value_state;
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

    auto const load_key = [&](int n_block) {
      auto& pipeline = storage.key_pipeline;
      FullBarrier& full = pipeline.full[key_state.stage];
      pipeline.empty[key_state.stage].wait(key_state.phase ^ 1);
      full.arrive_and_expect_tx(Traits::kSizeK);
      tma_load_rows<kBlockN, kHeadDim, Traits::kSlab>(
          params.key, raw(full), kKeep, storage.key + key_state.stage * Traits::kSizeK,
          n_block * kBlockN, head_k, batch);
      key_state.advance();
    };
    auto const load_value = [&](int n_block) {
      auto& pipeline = storage.value_pipeline;
      FullBarrier& full = pipeline.full[value_state.stage];
      pipeline.empty[value_state.stage].wait(value_state.phase ^ 1);
      full.arrive_and_expect_tx(Traits::kSizeK);
      SM90_TMA_LOAD_4D::copy(&params.value, raw(full), static_cast<uint64_t>(kKeep),
                             storage.value + value_state.stage * Traits::kSizeK, n_block * kBlockN,
                             0, head_k, batch);
      value_state.advance();
    };

    load_key(blocks.end - 1);
    for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
      storage.query_empty[warpgroup].wait(query_phase ^ 1);
      FullBarrier& full = storage.query_full[warpgroup];
      full.arrive_and_expect_tx(64 * kHeadDim);
      tma_load_rows<kBlockM, kHeadDim, Traits::kSlab>(
          params.query, raw(full), kReadOnce, storage.query + warpgroup * 64 * Traits::kSlab,
          work.tile.m_block * kBlockM + warpgroup * 64, work.tile.head, batch);
    }
    query_phase ^= 1;
    for (int n_block = blocks.end - 2; n_block >= blocks.begin; --n_block) {
      load_key(n_block);
      load_value(n_block + 1);
    }
    load_value(blocks.begin);
  }
}

}  // namespace jax_fa3::fp8
