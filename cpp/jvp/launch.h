// Host side of the tangent kernel: Problem -> descriptors and scalars -> launch.
#pragma once

#include "fwd/launch.h"
#include "jvp/jvp.h"
#include "jvp/kernel.h"

namespace jax_fa3::jvp {

template <class Traits>
cudaError_t make_params(Problem const& problem, Params* params) {
  jax_fa3::Problem const& p = problem.forward;
  auto const map_query = [&](CUtensorMap* map, Operand const& operand) {
    return make_tensor_map(map, operand, p.head_dim, p.seqlen_q, p.num_heads_q, p.batch,
                           Traits::kSlab, 64);
  };
  auto const map_key = [&](CUtensorMap* map, Operand operand, int head_dim) {
    // Without keys nothing is read, but a descriptor must point somewhere.
    if (p.seqlen_k == 0) operand.data = p.query.data;
    return make_tensor_map(map, operand, head_dim, p.seqlen_k, p.num_heads_k, p.batch,
                           Traits::kSlab, Traits::kBlockN);
  };
  JAX_FA3_RETURN_IF_ERROR(map_query(&params->query, p.query));
  JAX_FA3_RETURN_IF_ERROR(map_query(&params->query_dot, problem.query_dot));
  JAX_FA3_RETURN_IF_ERROR(map_key(&params->key, p.key, p.head_dim));
  JAX_FA3_RETURN_IF_ERROR(map_key(&params->key_dot, problem.key_dot, p.head_dim));
  JAX_FA3_RETURN_IF_ERROR(map_key(&params->value, p.value, p.head_dim_v));
  JAX_FA3_RETURN_IF_ERROR(map_key(&params->value_dot, problem.value_dot, p.head_dim_v));
  fwd::set_common(p, Traits::kBlockM, params);
  params->out_rows = p.out;
  params->out_dot = problem.out_dot;
  params->lse_dot = problem.lse_dot;
  params->score_dot_scale = p.softmax_scale;
  return cudaSuccess;
}

template <DType kDType, int kHeadDim>
cudaError_t launch(Problem const& problem, cudaStream_t stream) {
  using Traits = Traits<ElementOf<kDType>, kHeadDim>;
  Params params{};
  JAX_FA3_RETURN_IF_ERROR(make_params<Traits>(problem, &params));
  JAX_FA3_RETURN_IF_ERROR(fwd::reset_counter(params, stream));
  return fwd::launch_persistent<Traits>(params, stream);
}

}  // namespace jax_fa3::jvp
