// The FP8 mainloop of a consumer warpgroup: as in fwd/mma.h, with a scale for every block of keys
// and P in e4m3. Its state is in local variables of consume() (consume.h), to which Mainloop
// refers. (As members of one big struct, with __forceinline__ functions, head dim 128 spilled.)
#pragma once

#include "common/softmax.h"
#include "fp8/promotion.h"
#include "fp8/warpgroup_mma.h"

namespace jax_fa3::fp8 {

// A warp's position in the step pipeline. A stage holds what one step reads: K of block n, V of
// block n + 1, and the scales of block n. A tile's first stage has no V, and its last one no K.
template <class Traits>
struct StepReader {
  Pipeline<Traits::kStages>& pipeline;
  bool const elected;  // one thread of each warp
  PipelineState<Traits::kStages> state{};

  __device__ void wait() const { pipeline.full[state.stage].wait(state.phase); }
  __device__ void release() {
    if (elected) pipeline.empty[state.stage].arrive();
    state.advance();
  }
  // Over stages that other warpgroups need and this one does not.
  __device__ void skip(int count) {
    CUTLASS_PRAGMA_NO_UNROLL
    for (; count > 0; --count) {
      wait();
      release();
      __syncwarp();
    }
  }
};

template <class Traits>
struct Mainloop {
  Params const& params;
  typename Traits::SharedStorage& storage;
  int const warpgroup;
  WarpgroupMma<Traits>& mma;
  StepReader<Traits>& steps;
  float& query_scale;       // of the warpgroup's rows
  BlockScale& block_scale;  // of the block whose scores are in tSrS
  Interval (&rows)[kRowsPerThread];
  Softmax& softmax;

  // All of a tile but its first S, which is done already, and its epilogue.
  __device__ void run(int work_stage) const {
    BlockRange const blocks = storage.own_blocks[work_stage][warpgroup];
    [[maybe_unused]] bool promoted = false;  // whether a part of O is in shared memory
    if (!is_scale(query_scale)) query_scale = NAN;
    int n_block = blocks.end - 1;
    {
      bool const masked = n_block < blocks.full_begin || n_block >= blocks.full_end;
      float const softmax_scale_log2 = update_max(n_block, masked);
      softmax.template exponentiate<0, 1>(mma.tSrS, softmax_scale_log2, block_scale.log2_value);
      release_query(n_block == blocks.begin);
      mma.convert_scores();
    }
    clear(mma.tOrO);
    --n_block;
    while (n_block >= blocks.begin) {
      // Promotion ends an inner loop. A test for it in every step costs 4 %.
      constexpr int kInterval = Traits::kPromoteInSmem ? Traits::kPromotionInterval : 1 << 30;
      int const last = max(n_block / kInterval * kInterval, blocks.begin);
      while (n_block >= last) {
        if (n_block < blocks.full_end) {
          for (int const end = max(last, blocks.full_begin); n_block >= end; --n_block) {
            step<false>(n_block, n_block == blocks.begin);
          }
        }
        if (n_block >= last) {
          step<true>(n_block, n_block == blocks.begin);
          --n_block;
        }
      }
      if constexpr (Traits::kPromoteInSmem) {
        if (n_block >= blocks.begin) {
          mma.rescale_out(softmax);
          promote_out<Traits>(storage, warpgroup, softmax, mma.tOrO, promoted);
        }
      }
    }
    mma.rescale_out(softmax);
    steps.wait();
    mma.issue_out(steps.state.stage);
    mma.finish_out(softmax);
    steps.release();
    steps.skip(blocks.begin - storage.work[work_stage].blocks.begin);
    if constexpr (Traits::kPromoteInSmem) {
      if (promoted) add_promoted<Traits>(storage, warpgroup, softmax, mma.tOrO);
    }
    // The epilogue's maximum is that of probabilities of at most 1.
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) softmax.row_max[row] -= kMaxOffset;
  }

 private:
  // P V of block n + 1, S and softmax of block n. `last`: it is the tile's last S.
  template <bool kMasked>
  __device__ void step(int n_block, bool last) const {
    mma.rescale_out(softmax);
    steps.wait();
    block_scale = storage.scale[steps.state.stage];
    if constexpr (Traits::kIntraWarpgroupOverlap) {
      mma.issue_scores(steps.state.stage);
      mma.issue_out(steps.state.stage);
      warpgroup_wait<1>();
    } else {
      mma.issue_out(steps.state.stage);
      mma.finish_out(softmax);
      mma.issue_scores(steps.state.stage);
      warpgroup_wait<0>();
    }
    warpgroup_fence_operand(mma.tSrS);
    if constexpr (!Traits::kIntraWarpgroupOverlap) steps.release();
    float const softmax_scale_log2 = update_max(n_block, kMasked);
    softmax.template exponentiate<0, 2>(mma.tSrS, softmax_scale_log2, block_scale.log2_value);
    release_query(last);
    if constexpr (Traits::kIntraWarpgroupOverlap) {
      mma.finish_out(softmax);
      steps.release();
    }
    softmax.template exponentiate<1, 2>(mma.tSrS, softmax_scale_log2, block_scale.log2_value);
    mma.convert_scores();
  }

  // Masks the block's scores if need be, and raises the running maximum by them. Sets what O so far
  // is to be multiplied by: both for the maximum and for the accumulator's scale. Returns the
  // factor from what is in tSrS to exponents of base 2. Where no mask is needed it has the scales
  // of Q and K in it; else mask_block() has multiplied the scores by those.
  __device__ float update_max(int n_block, bool masked) const {
    float const score_scale = block_scale.key * query_scale;
    float const softmax_scale_log2 = params.exponents.scale_log2 * (masked ? 1.f : score_scale);
    if (masked) mask_block(n_block, score_scale);
    softmax.update_max(mma.tSrS, softmax_scale_log2, block_scale.log2_value);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      softmax.rescale[row] *= block_scale.out_rescale;
    }
    softmax.out_unit = block_scale.out_scale;
    return softmax_scale_log2;
  }

  // Multiplies the scores by the scales of Q and K, then applies the soft cap and the mask. The
  // multiplication comes first because a cap is not linear, and because a NaN scale must not reach
  // rows that the mask keeps from this block.
  __device__ void mask_block(int n_block, float score_scale) const {
    auto& tSrS = mma.tSrS;
    if (params.cap_scale != 0.f) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tSrS); ++i) {
        tSrS(i) = tanh_approx(tSrS(i) * (score_scale * params.cap_scale));
      }
    } else {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tSrS); ++i) tSrS(i) *= score_scale;
    }
    mask_scores(tSrS, rows, n_block * Traits::kBlockN + thread_index() % 4 * 2);
  }

  // After the tile's last S, the producer may overwrite Q. block_sum is a sum of exponentials and
  // never negative, so the comparison is always true, but ptxas does not know that. It makes this
  // arrive() depend on exponentials that are done by now; and as ptxas moves no wait for wgmma
  // across the arrive(), the wait for P V that follows stays behind them, too.
  __device__ void release_query(bool last) const {
    if (steps.elected && last && !(softmax.block_sum[0] < 0.f)) {
      storage.query_empty[warpgroup].arrive();
    }
  }
};

}  // namespace jax_fa3::fp8
