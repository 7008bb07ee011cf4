// Host side of the forward kernel of wide heads: Problem -> descriptors and
// scalars -> launch.
#pragma once

#include "common/element.h"
#include "common/launch.h"
#include "fwd/launch.h"
#include "wide/kernel.h"
#include "wide/wide.h"

namespace jax_fa3::wide {

template <class Traits>
cudaError_t make_params(Problem const& p, fwd::Params* params) {
  // Without keys nothing is read, but a descriptor must point somewhere.
  Operand key = p.key;
  Operand value = p.value;
  if (p.seqlen_k == 0) key.data = value.data = p.query.data;
  constexpr int kRows = Traits::kRows;
  constexpr int kKeys = Traits::kBlockN / kClusterSize;  // a CTA's part of a piece of K
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map(&params->query, p.query, p.head_dim, p.seqlen_q,
                                          p.num_heads_q, p.batch, 64, kRows));
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map(&params->key, key, p.head_dim, p.seqlen_k, p.num_heads_k,
                                          p.batch, 64, kKeys));
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map(&params->value, value, p.head_dim_v, p.seqlen_k,
                                          p.num_heads_k, p.batch, 64, Traits::kKeysOfPiece));
  if (p.out_dtype != DType::kFloat32) {
    JAX_FA3_RETURN_IF_ERROR(make_tensor_map(&params->out, p.out, p.head_dim_v, p.seqlen_q,
                                            p.num_heads_q, p.batch, 64, kRows));
  }
  fwd::set_common(p, Traits::kBlockM, params);
  return cudaSuccess;
}

template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch(Problem const& problem, cudaStream_t stream) {
  using Traits = Traits<ElementOf<kDType>, kHeadDim, kHeadDimV>;
  if (problem.bias.data != nullptr) return cudaErrorNotSupported;
  fwd::Params params{};
  JAX_FA3_RETURN_IF_ERROR(wide::make_params<Traits>(problem, &params));
  return launch_kernel(fwd_kernel<Traits>, int64_t{kClusterSize} * params.order.num_tiles(),
                       Traits::kThreads, sizeof(typename Traits::SharedStorage), params, stream);
}

}  // namespace jax_fa3::wide
