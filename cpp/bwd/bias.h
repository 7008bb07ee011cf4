// The bias in the backward: the warp that brings it, and its gradient, which is dS itself.
#pragma once

#include "bwd/params.h"
#include "bwd/traits.h"
#include "common/softmax.h"

namespace jax_fa3::bwd {

// A warp of the main kernel's producer: every step's slabs, for each warpgroup that computes S.
template <class Traits>
CUTLASS_DEVICE void load_bias_of_steps(BiasParams const& params,
                                       typename Traits::SharedStorage& storage,
                                       KeyTile const& tile) {
  bool const elected = threadIdx.x % 32 == 0;
  PipelineState<Traits::kStages> state;
  PipelineState<Traits::kBiasStages> bias_state[Traits::kWarpgroupsN];
  for (;; state.advance()) {
    storage.query_pipeline.full[state.stage].wait(state.phase);
    Step const step = storage.steps[state.stage];
    __syncwarp();
    if (elected) storage.query_pipeline.empty[state.stage].arrive();
    if (step.m_block < 0) return;
    if (elected) {
      CUTLASS_PRAGMA_UNROLL
      for (int warpgroup = 0; warpgroup < Traits::kWarpgroupsN; ++warpgroup) {
        load_bias<64>(params.bias, storage.bias_rings[warpgroup], storage.bias(warpgroup),
                      bias_state[warpgroup], tile.n_block * Traits::kBlockN + warpgroup * 64,
                      {step.m_block * Traits::kBlockM, step.head, tile.batch});
      }
    }
    if (step.ends) return;
  }
}

// Adds dS^T of a step, in fp32 and times `scale`, to the bias's gradient. Where the bias is the
// same for all query rows they are summed first. `key`: the first of the thread's two.
template <class Scores>
CUTLASS_DEVICE void add_dbias(BiasParams const& params, int batch, int head, int first_row, int key,
                              float scale, Scores const& ds) {
  if (params.dbias == nullptr) return;
  float const factor = 1.f / scale;
  float* const column =
      params.dbias + batch * params.dbias_batch_stride + head * params.dbias_head_stride + key;
  // Outside the array dS is 0, but 0 * NaN where a row's dO or a key is not finite.
  bool const exists[kRowsPerThread] = {key < params.mask.seqlen_k, key + 8 < params.mask.seqlen_k};
  if (params.dbias_row_stride == 0) {
    float sum[kRowsPerThread] = {0.f, 0.f};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(ds); ++i) sum[fragment_row(i)] += ds(i);
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      sum[r] = quad_sum(sum[r]);
      if (threadIdx.x % 4 == 0 && exists[r] && sum[r] != 0.f) {
        atomicAdd(column + r * 8, sum[r] * factor);
      }
    }
    return;
  }
  int const rows = params.mask.seqlen_q - first_row - threadIdx.x % 4 * 2;  // from this thread's on
  float* row = column + (first_row + threadIdx.x % 4 * 2) * params.dbias_row_stride;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(ds); i += 4) {  // two query rows of 8
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < 4; ++e) {
      float* const place = row + e % 2 * params.dbias_row_stride + fragment_row(e) * 8;
      if (i / 4 * 8 + e % 2 < rows && exists[fragment_row(e)] && ds(i + e) != 0.f) {
        atomicAdd(place, ds(i + e) * factor);
      }
    }
    row += 8 * params.dbias_row_stride;
  }
}

}  // namespace jax_fa3::bwd
