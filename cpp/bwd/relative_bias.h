// The gradient of a bias by distance: dS summed along its diagonals.
#pragma once

#include "bwd/params.h"
#include "bwd/traits.h"

namespace jax_fa3::bwd {

// Adds dS^T of a step, as dK and dQ take it, times `scale`. A warp sums its 16 keys: first each
// thread, whose two keys share diagonals; then the eight lanes of a column go to the lane that
// stands for their diagonal, of which 8 columns have as many; then the four lanes of a key are
// summed, each of them taking a quarter of the diagonals. What is left goes to global memory, 32
// neighbours at a time. `first_key`: the warp's; `first_row`: the step's.
template <class Traits, class Packed>
CUTLASS_DEVICE void add_drelative(RelativeParams const& params, KeyTile const& tile, int head,
                                  int first_key, int first_row, float scale, Packed const& ds) {
  using Element = typename Traits::Element;
  if (params.drelative == nullptr) return;
  constexpr int kColumns = Traits::kBlockM / 8;  // in eights
  constexpr int kQuarter = ceil_div(kColumns + 2, 4);
  int const lane = threadIdx.x % 32;
  int const quad = lane % 4;
  // Entry i of lane 4 v + q: the sum of distances first_key - first_row + 8 - 8 i + v.
  float sums[4 * kQuarter] = {};
  CUTLASS_PRAGMA_UNROLL
  for (int e = 0; e < 2; ++e) {
    int const key = lane / 4 + 2 * quad + e;  // on the diagonal of v, maybe in the next 8 keys
    float before = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i <= kColumns; ++i) {
      float const own = i < kColumns ? unpack<Element>(ds(2 * i + 1), e) : 0.f;
      float const of_first_key = i > 0 ? unpack<Element>(ds(2 * i - 2), e) : 0.f;
      float const found = __shfl_sync(~0u, own + of_first_key, key % 8 * 4 + quad);
      sums[i] += key < 8 ? found : before;
      before = found;
    }
    sums[kColumns + 1] += key < 8 ? 0.f : before;
  }
  auto const halve = [&](int size, int bit) {  // lanes with the bit take the odd ones
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size; ++i) {
      float const kept = quad & bit ? sums[2 * i + 1] : sums[2 * i];
      float const given = quad & bit ? sums[2 * i] : sums[2 * i + 1];
      sums[i] = kept + __shfl_xor_sync(~0u, given, bit);
    }
  };
  halve(2 * kQuarter, 1);
  halve(kQuarter, 2);

  RelativeBias const& bias = params.relative_bias;
  int part = 0;
  if (params.drelative_parts > 1) {
    int const cta = tile.n_block * params.num_splits + tile.split;
    part = cta * (Traits::kConsumerThreads / 32) + threadIdx.x % Traits::kConsumerThreads / 32;
  }
  int64_t const row = int64_t{tile.batch} * params.num_heads_q + head;
  float* const target = params.drelative + (row * params.drelative_parts + part) * bias.size +
                        (bias.zero + first_key - first_row + 8 + lane / 4 - quad * 8);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kQuarter; ++i) {
    if (sums[i] != 0.f) atomicAdd(target - i * 32, sums[i] / scale);
  }
}

}  // namespace jax_fa3::bwd
