// Host side of the FP8 forward: Problem -> descriptors and scalars -> the launch of the forward,
// and before it that of the transposition of V where that is not done and the forward does not do
// it.
#pragma once

#include "fp8/consume.h"
#include "fp8/load.h"
#include "fp8/transpose.h"
#include "fwd/launch.h"

namespace jax_fa3::fp8 {

template <int kHeadDim>
cudaError_t make_params(Problem const& problem, Params* params) {
  using Traits = Traits<kHeadDim>;
  jax_fa3::Problem const& p = problem.forward;
  // Without keys nothing is read, but a descriptor must point somewhere.
  Operand key = p.key;
  int64_t const keys = int64_t{ceil_div(p.seqlen_k, kBlock)} * kBlock;
  Operand value{problem.transposed_value, keys * p.head_dim * p.num_heads_k, keys,
                keys * p.head_dim};
  if (p.seqlen_k == 0) key.data = value.data = p.query.data;
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map<uint8_t>(&params->query, p.query, p.head_dim, p.seqlen_q,
                                                   p.num_heads_q, p.batch, Traits::kSlab, 64));
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map<uint8_t>(&params->key, key, p.head_dim, p.seqlen_k,
                                                   p.num_heads_k, p.batch, Traits::kSlab, kBlock));
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map<uint8_t>(&params->value, value, static_cast<int>(keys),
                                                   p.head_dim, p.num_heads_k, p.batch, kBlock,
                                                   kHeadDim));
  if (p.out_dtype != DType::kFloat32) {
    JAX_FA3_RETURN_IF_ERROR(make_tensor_map(&params->out, p.out, p.head_dim, p.seqlen_q,
                                            p.num_heads_q, p.batch, Traits::kSlabV, 64));
  }
  fwd::set_common(p, Traits::kBlockM, params);
  // As in the 16-bit forward, whose warpgroups have 64 rows each, too.
  params->order.short_last =
      !p.mask.restricts() && fwd::has_idle_warpgroup(p.seqlen_q, Traits::kBlockM);
  // The epilogue makes the log-sum-exp of row_max * softmax_scale; here row_max is an exponent of
  // base 2 already.
  params->softmax_scale = 1 / kLog2E;
  params->query_scale = problem.query_scale;
  params->key_scale = problem.key_scale;
  params->value_scale = problem.value_scale;
  params->value_mean = problem.value_mean;
  params->num_query_blocks = ceil_div(p.seqlen_q, kBlock);
  params->num_key_blocks = ceil_div(p.seqlen_k, kBlock);
  params->num_heads_k = p.num_heads_k;
  params->out_fp16 = p.out_dtype == DType::kFloat16;
  Transpose& transpose = params->transpose;
  transpose.value = p.value;
  transpose.out = problem.transposed_value;
  transpose.mask = p.mask;
  transpose.scale = problem.value_scale;
  transpose.head_dim = p.head_dim;
  transpose.order = {params->num_key_blocks, p.num_heads_k, p.batch, p.num_heads_k};
  return cudaSuccess;
}

template <int kHeadDim>
cudaError_t launch_fwd(Problem const& problem, cudaStream_t stream) {
  jax_fa3::Problem const& p = problem.forward;
  Params params{};
  JAX_FA3_RETURN_IF_ERROR(make_params<kHeadDim>(problem, &params));
  int num_sms = 0;
  JAX_FA3_RETURN_IF_ERROR(count_sms(&num_sms));
  if (p.value.data == nullptr) {
    JAX_FA3_RETURN_IF_ERROR(fwd::reset_counter(params, stream));
    return fwd::launch_persistent<Traits<kHeadDim>>(params, stream);
  }
  Transpose& transpose = params.transpose;
  // Tiles that read a block of V, if nothing is masked; a last one with fewer rows does not count.
  int const readers = p.seqlen_q / Traits<kHeadDim>::kBlockM * params.group;
  if (Traits<kHeadDim>::kTransposesInKernel &&
      transposes_in_forward(p.mask, readers, params.order.num_tiles(), num_sms)) {
    // V is transposed in the order in which tiles need it: block by block, each block of all KV
    // heads whose tiles run at the same time. Those are as many heads as have a tile for every SM,
    // or under a mask those of a section, of which all heads' tiles take turns.
    int const heads = std::max(ceil_div(num_sms, readers),
                               ceil_div(std::min(params.order.section, num_sms), params.group));
    transpose.order.section = std::min(heads, p.num_heads_k * p.batch);
    transpose.warp_tile_counter = problem.counters + 1;
    transpose.num_done = problem.counters + 2;
    std::size_t const count = 2 + transpose.order.num_tiles();
    JAX_FA3_RETURN_IF_ERROR(cudaMemsetAsync(problem.counters, 0, count * sizeof(int), stream));
    return fwd::launch_persistent<Traits<kHeadDim>>(params, stream);
  }
  // The forward is launched while the transposition runs (programmatic dependent launch): nothing
  // may stand between the two in the stream, so the counter is reset before. Without keys there is
  // no transposition, and the forward waits for what is before it as usual.
  JAX_FA3_RETURN_IF_ERROR(fwd::reset_counter(params, stream));
  JAX_FA3_RETURN_IF_ERROR(launch_transpose(transpose, stream));
  Start const start = p.seqlen_k > 0 ? Start::kEarly : Start::kInOrder;
  return fwd::launch_persistent<Traits<kHeadDim>>(params, stream, start);
}

}  // namespace jax_fa3::fp8
