// Host side of the backward of wide heads: BackwardProblem -> descriptors and scalars -> launches.
#pragma once

#include "bwd/launch.h"
#include "wide_bwd/kernel.h"
#include "wide_bwd/wide_bwd.h"

namespace jax_fa3::wide_bwd {

// What is loaded in boxes of this kernel's own; all else is as bwd/launch.h has it.
template <class Traits>
cudaError_t make_params(BackwardProblem const& problem, Params* params) {
  Problem const& p = problem.forward;
  JAX_FA3_RETURN_IF_ERROR(bwd::make_params<Traits>(problem, params));
  auto const map = [&](CUtensorMap* map, Operand operand, bool of_keys, bool of_value, int rows) {
    if (operand.data == nullptr) operand.data = problem.row_stats;
    if (operand.data == nullptr) operand.data = problem.dkey.data;
    return make_tensor_map(map, operand, of_value ? p.head_dim_v : p.head_dim,
                           of_keys ? p.seqlen_k : p.seqlen_q,
                           of_keys ? p.num_heads_k : p.num_heads_q, p.batch, 64, rows);
  };
  JAX_FA3_RETURN_IF_ERROR(map(&params->query, p.query, false, false, 64));
  JAX_FA3_RETURN_IF_ERROR(map(&params->dout, problem.dout, false, true, 64));
  JAX_FA3_RETURN_IF_ERROR(map(&params->key, p.key, true, false, 64));
  JAX_FA3_RETURN_IF_ERROR(map(&params->value, p.value, true, true, 64));
  constexpr int kRows = Traits::kRowsOfGrad;
  JAX_FA3_RETURN_IF_ERROR(map(&params->query_rows, p.query, false, false, kRows));
  JAX_FA3_RETURN_IF_ERROR(map(&params->dout_rows_map, problem.dout, false, true, kRows));
  return map(&params->key_rows, p.key, true, false, kRows);
}

template <class Traits>
cudaError_t launch_clusters(int64_t num_tiles, Params& params, cudaStream_t stream) {
  if (num_tiles == 0) return cudaSuccess;
  return launch_kernel(bwd_kernel<Traits>, Traits::kClusterSize * num_tiles, Traits::kThreads,
                       sizeof(typename Traits::SharedStorage), params, stream);
}

// One kernel takes all head dims.
template <DType kDType>
cudaError_t launch_all(BackwardProblem const& problem, cudaStream_t stream) {
  using Element = ElementOf<kDType>;
  using OfKeys = Traits<Element, true>;
  using OfQueries = Traits<Element, false>;
  Problem const& forward = problem.forward;
  if (forward.bias.data != nullptr) return cudaErrorNotSupported;  // the handlers have refused it
  if (forward.seqlen_q == 0 && forward.seqlen_k == 0) return cudaSuccess;
  Params params{};
  JAX_FA3_RETURN_IF_ERROR(wide_bwd::make_params<OfKeys>(problem, &params));
  bwd::Params& common = params;
  JAX_FA3_RETURN_IF_ERROR((
      bwd::launch_before<Element, OfKeys::kBlockM, OfKeys::kHeadDimV, 0>(problem, common, stream)));
  JAX_FA3_RETURN_IF_ERROR(launch_clusters<OfKeys>(params.order.num_tiles(), params, stream));
  JAX_FA3_RETURN_IF_ERROR(bwd::launch_sum_partial<Element>(problem, common, stream));
  return launch_clusters<OfQueries>(params.dq_order.num_tiles(), params, stream);
}

template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch(BackwardProblem const& problem, cudaStream_t stream) {
  return launch_all<kDType>(problem, stream);
}

}  // namespace jax_fa3::wide_bwd
