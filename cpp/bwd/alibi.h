// The gradient of ALiBi's slopes: the sum of dS, each times its key's distance from its query row.
#pragma once

#include "bwd/params.h"
#include "bwd/traits.h"

namespace jax_fa3::bwd {

// Adds dS^T of a step, as dK and dQ take it, times `scale`, for the head that the step is of. (In
// fp32 it would keep registers that head dim 64 does not have.) Each thread of
// each CTA has a part of its own and adds to it step by step, so that the sum has one order.
template <class Traits, class Packed>
CUTLASS_DEVICE void add_dalibi(AlibiParams const& params, KeyTile const& tile, int head,
                               int distance, float scale, Packed const& ds) {
  if (params.dalibi == nullptr) return;
  int const cta = tile.n_block * params.num_splits + tile.split;
  int64_t const row = int64_t{tile.batch} * params.num_heads_q + head;
  float* const part = params.dalibi + row * params.dalibi_parts + cta * Traits::kConsumerThreads +
                      threadIdx.x % Traits::kConsumerThreads;
  atomicAdd(part, sum_of_distances<typename Traits::Element>(distance, ds) / scale);
}

}  // namespace jax_fa3::bwd
