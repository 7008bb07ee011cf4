// The loading warp: Q, K and V by TMA, each together with its tangent.
#pragma once

#include "common/key_source.h"
#include "common/tma.h"
#include "fwd/load.h"
#include "jvp/traits.h"

namespace jax_fa3::jvp {

template <class Element, int kHeadDim>
CUTLASS_DEVICE void use_spare_warp(Traits<Element, kHeadDim>, Params const&) {}

template <class Element, int kHeadDim>
CUTLASS_DEVICE void load(Traits<Element, kHeadDim>, Params const& params,
                         typename Traits<Element, kHeadDim>::SharedStorage& storage) {
  using Traits = Traits<Element, kHeadDim>;
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  constexpr int kSlab = Traits::kSlab;
  constexpr auto kKeep = TMA::CacheHintSm90::EVICT_LAST;       // K and V: read by many tiles
  constexpr auto kReadOnce = TMA::CacheHintSm90::EVICT_FIRST;  // Q
  int const lane = threadIdx.x % 32;

  PipelineState<Traits::kWorkStages> work_state;
  PipelineState<Traits::kStages> state;
  uint32_t query_phase = 0;
  uint32_t staged_phase = 0;

  for (;; work_state.advance()) {
    WorkTile const work = fwd::read_work(storage, work_state);
    if (work.last) return;
    int const batch = work.tile.batch;
    KeySource const keys{batch, work.tile.head / params.group};
    auto const take_next_tile = [&] {
      if (lane == 0) storage.work_pipeline.empty[work_state.stage].arrive();
    };

    // Rows at or past the length may hold anything; `clean`: they are to be 0.
    int const length_k = params.mask.length_k(batch);
    auto const load_pair = [&](CUtensorMap const& upper, CUtensorMap const& lower, int n_block,
                               bool clean) {
      auto& pipeline = storage.pair_pipeline;
      uint16_t* const smem = storage.pairs + state.stage * Traits::kSizePair;
      int const valid_rows = length_k - n_block * kBlockN;
      clean = clean && valid_rows < kBlockN && length_k < params.mask.seqlen_k;
      FullBarrier& full = clean ? storage.value_staged : pipeline.full[state.stage];
      if (lane == 0) {
        RowCoord const from = keys.template block<kBlockN>(n_block);
        pipeline.empty[state.stage].wait(state.phase ^ 1);
        full.arrive_and_expect_tx(Traits::kSizePair * 2);
        tma_load_rows<2 * kBlockN, kHeadDim, kSlab>(upper, full, kKeep, smem, from);
        tma_load_rows<2 * kBlockN, kHeadDim, kSlab>(lower, full, kKeep, smem + kBlockN * kSlab,
                                                    from);
      }
      if (clean) {
        __syncwarp();
        storage.value_staged.wait(staged_phase);
        staged_phase ^= 1;
        // In memory the two take turns, slab by slab.
        zero_rows_from<kBlockN, 2 * kHeadDim, kSlab>(smem, valid_rows);
        if (lane == 0) pipeline.full[state.stage].arrive();
      }
      state.advance();
    };
    auto const load_key = [&](int n_block) {
      load_pair(params.key, params.key_dot, n_block, false);
    };
    auto const load_value = [&](int n_block) {
      load_pair(params.value_dot, params.value, n_block, true);  // 0 * NaN is NaN
    };

    BlockRange const blocks = work.blocks;
    if (blocks.begin >= blocks.end) {
      take_next_tile();
      continue;
    }
    load_key(blocks.end - 1);
    for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
      if (lane != 0) break;
      storage.query_empty[warpgroup].wait(query_phase ^ 1);
      FullBarrier& full = storage.query_full[warpgroup];
      full.arrive_and_expect_tx(2 * 64 * kHeadDim * 2);
      RowCoord const from{work.tile.block * kBlockM + warpgroup * 64, work.tile.head, batch};
      int const offset = warpgroup * 64 * kSlab;
      tma_load_rows<kBlockM, kHeadDim, kSlab>(params.query, full, kReadOnce, storage.query + offset,
                                              from);
      tma_load_rows<kBlockM, kHeadDim, kSlab>(params.query_dot, full, kReadOnce,
                                              storage.query_dot + offset, from);
    }
    query_phase ^= 1;
    fwd::load_blocks(params, blocks, load_key, load_value, take_next_tile);
  }
}

}  // namespace jax_fa3::jvp
