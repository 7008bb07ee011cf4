// The producer of the FP8 forward: as in fwd/load.h, but K and V share a ring, and V is transposed
// and clean.
#pragma once

#include "common/key_source.h"
#include "common/tma.h"
#include "fp8/traits.h"

namespace jax_fa3::fp8 {

// Scales of one block of keys after the other, from the last on, each loaded while those behind it
// are in use.
class ScaleLoader {
 public:
  CUTLASS_DEVICE ScaleLoader(Params const& params, int batch, int head, int n_block)
      : params_(params),
        first_(int64_t{batch} * params.num_key_blocks * params.num_heads_k + head) {
    fetch(n_block);
  }

  // Of the block that was fetched last; then fetches the one before it, if there is one. A scale
  // that is none makes NaN of the rows that see the block, and only of those: the key's scale meets
  // scores before the mask does.
  CUTLASS_DEVICE BlockScale next(int n_block) {
    bool const valid = is_scale(value_);
    float const key = valid && is_scale(key_) ? key_ : NAN;
    float const value = valid ? value_ : unit_;
    float exponent = __log2f(value) - __log2f(unit_);
    float ratio = 1.f;
    if (fabsf(exponent) > kUnitRange) {
      ratio = fminf(exp2f(-exponent), 0x1p127f);  // finite: an O of 0 is multiplied by it, too
      exponent = 0.f;
      unit_ = value;
    }
    if (n_block > 0) fetch(n_block - 1);
    return {key, unit_, ratio, exponent};
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
  float unit_ = 1.f;
};

// The warps that have nothing else to do.
template <int kHeadDim>
CUTLASS_DEVICE void use_spare_warp(Traits<kHeadDim>, Params const& params) {
  if constexpr (Traits<kHeadDim>::kTransposesBeside) {
    if (params.transpose.taken != nullptr) transpose_beside<kHeadDim>(params.transpose);
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

    // What a step reads: K of a block and V of the one after it, where there are such.
    auto const load_step = [&](int key_block, int value_block) {
      auto& pipeline = storage.step_pipeline;
      FullBarrier& full = pipeline.full[state.stage];
      bool const has_key = key_block >= blocks.begin;
      bool const has_value = value_block < blocks.end;
      BlockScale scale;
      if (has_key) scale = scales.next(key_block);
      if constexpr (Traits::kTransposesBeside) {
        if (has_value && params.transpose.done != nullptr) {
          wait_for<kHeadDim>(params.transpose, {value_block, head_k, batch});
        }
      }
      pipeline.empty[state.stage].wait(state.phase ^ 1);
      if (has_key) storage.scale[state.stage] = scale;
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
    cudaGridDependencySynchronize();  // if V is what the kernel before this one makes
    for (int n_block = blocks.end - 2; n_block >= blocks.begin - 1; --n_block) {
      load_step(n_block, n_block + 1);
    }
  }
  // A CTA without blocks must not end before that kernel, either: what comes next relies on it.
  cudaGridDependencySynchronize();
}

}  // namespace jax_fa3::fp8
