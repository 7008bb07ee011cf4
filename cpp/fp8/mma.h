// The FP8 mainloop of a consumer warpgroup: as in fwd/mma.h, with a scale for every block of keys
// and P in e4m3. Its state is in local variables of consume() (consume.h), to which Mainloop
// refers. (As members of one big struct, with __forceinline__ functions, head dim 128 spilled.)
#pragma once

#include "common/softmax.h"
#include "fp8/warpgroup_mma.h"

namespace jax_fa3::fp8 {

// A warp's position in the step pipeline. A stage holds what one step reads: K of block n, V of
// block n + 1, and their scales. A tile's first stage has no V, and its last one no K.
template <class Traits>
struct StepReader {
  Pipeline<Traits::kStages>& pipeline;
  // One thread of each warp; found anew each time, for registers are few.
  __device__ static bool elected() { return thread_index() % 32 == 0; }
  PipelineState<Traits::kStages> state{};

  __device__ void wait() const { pipeline.full[state.stage].wait(state.phase); }
  __device__ void release() {
    if (elected()) pipeline.empty[state.stage].arrive();
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
  float& query_scale;  // of the warpgroup's rows
  float& key_scale;    // of the block whose scores are in tSrS
  Softmax& softmax;

  // All of a tile but its first S, which is done already, and its epilogue.
  CUTLASS_DEVICE void run(int work_stage) const {
    BlockRange const blocks = storage.warpgroup_blocks[work_stage][warpgroup];
    if (!is_scale(query_scale)) query_scale = NAN;
    int n_block = blocks.end - 1;
    clear(mma.tOrO);
    {
      bool const masked = n_block < blocks.full_begin || n_block >= blocks.full_end;
      release_query(n_block == blocks.begin);
      softmax.exponentiate<kSums>(mma.tSrS, update_max(n_block, masked));
      mma.convert_scores();
    }
    --n_block;
    while (n_block >= blocks.begin) {
      if (n_block < blocks.full_end) {
        for (; n_block >= blocks.full_begin; --n_block)
          step<false>(n_block, n_block == blocks.begin);
      }
      if (n_block >= blocks.begin) {
        step<true>(n_block, n_block == blocks.begin);
        --n_block;
      }
    }
    steps.wait();
    mma.add_out(steps.state.stage, storage.scale[steps.state.stage].value, softmax.row_sum);
    steps.release();
    steps.skip(blocks.begin - storage.work[work_stage].blocks.begin);
    if (params.value_mean != nullptr) add_value_mean(storage.work[work_stage].tile);
    // The epilogue's maximum is that of probabilities of at most 1.
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) softmax.row_max[row] -= kMaxOffset;
  }

 private:
  static constexpr bool kSums = !Traits::kSumsByMma;  // of P, by FADDs

  // O += row sum * mean, which becomes mean in the epilogue. The columns that V does not have are
  // not stored.
  CUTLASS_DEVICE void add_value_mean(TileCoord tile) const {
    float const* const mean =
        params.value_mean +
        (int64_t{tile.batch} * params.num_heads_k + tile.head / params.group) * params.head_dim_v;
    float sums[kRowsPerThread];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      sums[row] = quad_sum(softmax.row_sum[row]) * (1 / kOutScale);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(mma.tOrO); i += 4) {
      int const column = fragment_column(i) + thread_index() % 4 * 2;
      if (column >= params.head_dim_v) break;
      float2 const pair = __ldg(reinterpret_cast<float2 const*>(mean + column));
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRowsPerThread; ++row) {
        mma.tOrO(i + 2 * row) += sums[row] * pair.x;
        mma.tOrO(i + 2 * row + 1) += sums[row] * pair.y;
      }
    }
  }

  // P V of block n + 1 (and where the tensor cores find them the sums of its P), S and softmax of
  // block n. `last`: it is the tile's last S.
  template <bool kMasked>
  __device__ void step(int n_block, bool last) const {
    steps.wait();
    StepScale const& scale = storage.scale[steps.state.stage];
    mma.add_out(steps.state.stage, scale.value, softmax.row_sum);
    mma.issue_scores(steps.state.stage);
    warpgroup_wait<0>();
    warpgroup_fence_operand(mma.tSrS);
    key_scale = scale.key;
    steps.release();
    release_query(last);
    softmax.exponentiate<kSums>(mma.tSrS, update_max(n_block, kMasked));
    mma.convert_scores();
  }

  // Masks the block's scores if need be, and raises the running maximum by them. Returns the factor
  // from what is in tSrS to exponents of base 2. Where no mask is needed it has the scales of Q and
  // K in it; else mask_block() has multiplied the scores by those.
  __device__ float update_max(int n_block, bool masked) const {
    float const score_scale = key_scale * query_scale;
    float const softmax_scale_log2 =
        params.exponents.softmax_scale_log2 * (masked ? 1.f : score_scale);
    if (masked) mask_block(n_block, score_scale);
    softmax.update_max(mma.tSrS, softmax_scale_log2);
    mma.rescale_out(softmax);
    return softmax_scale_log2;
  }

  // Multiplies the scores by the scales of Q and K, then applies the soft cap and the mask. The
  // multiplication comes first because a cap is not linear, and because a NaN scale must not reach
  // rows that the mask keeps from this block.
  __device__ void mask_block(int n_block, float score_scale) const {
    params.score.apply(mma.tSrS, score_scale);
    mask_scores(mma.tSrS, rows_of_thread(storage),
                n_block * Traits::kBlockN + thread_index() % 4 * 2);
  }

  // After the tile's last S, the producer may overwrite Q.
  __device__ void release_query(bool last) const {
    if (last && steps.elected()) storage.query_empty[warpgroup].arrive();
  }
};

}  // namespace jax_fa3::fp8
