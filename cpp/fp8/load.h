// The producer of the FP8 forward: as in fwd/load.h, but K of a block and V of the one after it
// share a stage; and V is V^T, in which the keys past the length are zeros already (transpose.h).
#pragma once

#include "common/key_source.h"
#include "common/tma.h"
#include "fp8/traits.h"

namespace jax_fa3::fp8 {

// Gives the scales of a tile's steps, from the last block of keys to the first. Those of the next
// block are read from global memory one call ahead, so that their latency is hidden.
class ScaleLoader {
 public:
  CUTLASS_DEVICE ScaleLoader(Params const& params, int batch, int head, int n_block)
      : params_(params),
        first_(int64_t{batch} * params.num_key_blocks * params.num_heads_k + head) {
    fetch(n_block);
  }

  // Of the step that reads K of n_block, the block fetched last (-1: no block), and V of the block
  // before it in this order. Fetches the scales of the next block. If K's or V's scale of a block
  // is invalid, K's becomes NaN, and so do the block's scores. The consumers multiply by it before
  // they mask: only the rows that see the block become NaN.
  CUTLASS_DEVICE StepScale next(int n_block) {
    bool const valid = is_scale(value_);
    StepScale const result{valid && is_scale(key_) ? key_ : NAN, last_value_};
    last_value_ = valid ? value_ * (1 / kOutScale) : 0.f;
    if (n_block > 0) fetch(n_block - 1);
    return result;
  }

 private:
  CUTLASS_DEVICE void fetch(int n_block) {
    int64_t const index = first_ + int64_t{n_block} * params_.num_heads_k;
    key_ = __ldg(params_.key_scale + index);
    value_ = __ldg(params_.value_scale + index);
  }

  Params const& params_;
  int64_t first_;
  float key_, value_;
  float last_value_ = 0.f;
};

// The two warps of the producer warpgroup that neither load nor schedule: they transpose V.
template <int kHeadDim>
CUTLASS_DEVICE void use_spare_warp(Traits<kHeadDim>, Params const& params) {
  if constexpr (Traits<kHeadDim>::kTransposesInKernel) {
    if (params.transpose.warp_tile_counter != nullptr) transpose_all<kHeadDim>(params.transpose);
  }
}

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

  for (;; work_state.advance()) {
    storage.work_pipeline.full[work_state.stage].wait(work_state.phase);
    WorkTile const work = storage.work[work_state.stage];
    storage.work_pipeline.empty[work_state.stage].arrive();
    if (work.last) break;
    int const batch = work.tile.batch;
    int const head_k = work.tile.head / params.group;
    KeySource const keys{batch, head_k};
    BlockRange const blocks = work.blocks;
    uint32_t const query_phase = Traits::query_phase(work_state.stage);
    if (blocks.begin >= blocks.end) {
      for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
        storage.query_empty[warpgroup].wait(query_phase ^ 1);
        storage.query_full[warpgroup].arrive();
      }
      continue;
    }

    ScaleLoader scales{params, batch, head_k, blocks.end - 1};

    // One stage: K of a block and V of the one after it, of which the tile's first stage has only K
    // and its last one only V.
    auto const load_step = [&](int key_block, int value_block) {
      auto& pipeline = storage.step_pipeline;
      FullBarrier& full = pipeline.full[state.stage];
      bool const has_key = key_block >= blocks.begin;
      bool const has_value = value_block < blocks.end;
      StepScale const scale = scales.next(key_block);
      if constexpr (Traits::kTransposesInKernel) {
        if (has_value && params.transpose.num_done != nullptr) {
          wait_transposed<kHeadDim>(params.transpose, {value_block, head_k, batch});
        }
      }
      pipeline.empty[state.stage].wait(state.phase ^ 1);
      storage.scale[state.stage] = scale;
      full.arrive_and_expect_tx((has_key + has_value) * Traits::kSizeK);
      if (has_key) {
        tma_load_rows<kBlockN, kHeadDim, Traits::kSlab>(params.key, full, kKeep,
                                                        storage.key + state.stage * Traits::kSizeK,
                                                        keys.block<kBlockN>(key_block));
      }
      if (has_value) {
        SM90_TMA_LOAD_4D::copy(
            &params.value, reinterpret_cast<uint64_t*>(&full), static_cast<uint64_t>(kKeep),
            storage.value + state.stage * Traits::kSizeK, value_block * kBlockN, 0, head_k, batch);
      }
      state.advance();
    };

    load_step(blocks.end - 1, blocks.end);
    for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
      storage.query_empty[warpgroup].wait(query_phase ^ 1);
      FullBarrier& full = storage.query_full[warpgroup];
      full.arrive_and_expect_tx(64 * kHeadDim);
      tma_load_rows<kBlockM, kHeadDim, Traits::kSlab>(
          params.query, full, kReadOnce, storage.query + warpgroup * 64 * Traits::kSlab,
          {work.tile.block * kBlockM + warpgroup * 64, work.tile.head, batch});
    }
    // If a kernel of its own transposes V, this one has been launched before that is done: wait for
    // it before the first V.
    cudaGridDependencySynchronize();
    for (int n_block = blocks.end - 2; n_block >= blocks.begin - 1; --n_block) {
      load_step(n_block, n_block + 1);
    }
  }
  // A CTA that loaded nothing must not end before that kernel, either: the next kernel in the
  // stream waits for the end of this one only, and may overwrite what that one still reads.
  cudaGridDependencySynchronize();
}

}  // namespace jax_fa3::fp8
