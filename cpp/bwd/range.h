// fp16 alone: the power of 2 that brings dS into its range.
//
// |dS| <= P (|dO| |V| + |delta|), by row norms, so a bound for a KV head and its query heads
// follows from the longest row of dO and of V and the largest |dlse|. Without it dS of small
// cotangents is below fp16's range, and that of large ones above. bf16 has the range of fp32.
#pragma once

#include "bwd/params.h"
#include "bwd/rows.h"

namespace jax_fa3::bwd {

enum Range { kLongestdO, kLongestV, kLargestdLse, kNumRanges };  // the first two squared

inline constexpr int kRangeThreads = 256;
inline constexpr int kRangeRows = 8;

CUTLASS_HOST_DEVICE constexpr int64_t range_chunks(int batch, int seqlen, int heads) {
  return int64_t{batch} * heads * ((seqlen + kRangeRows - 1) / kRangeRows);
}

// What dS is multiplied by. It is 1 where `ranges` is null, as where dQ is accumulated over several
// calls: they must have one scale.
template <class Element>
CUTLASS_DEVICE float ds_scale(Params const& params, int batch, int head_k) {
  if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    if (params.ranges == nullptr) return 1.f;
    uint32_t const* const ranges =
        params.ranges + (int64_t{batch} * params.num_heads_k + head_k) * kNumRanges;
    float const bound = 2.f * sqrtf(__uint_as_float(ranges[kLongestdO])) *
                            sqrtf(__uint_as_float(ranges[kLongestV])) +
                        __uint_as_float(ranges[kLargestdLse]);
    if (!(bound > 0.f && bound < INFINITY)) return 1.f;
    // To between 2^14 and 2^15: there half of fp16's 65504 is left for rounding.
    int const exponent = 14 + 2 * 127 - static_cast<int>(__float_as_uint(bound) >> 23);
    return __uint_as_float(static_cast<uint32_t>(min(max(exponent, 27), 227)) << 23);
  }
  return 1.f;
}

// A warp takes kRangeRows rows of a head, of dO or V, whose loads are under way at once, and then
// needs one atomic for all of them.
template <class Element, int kHeadDimV, class Params_ = Params>
__global__ void __launch_bounds__(kRangeThreads)
    range_kernel(__grid_constant__ Params_ const params) {
  Mask const& mask = params.mask;
  constexpr int kVectors = kHeadDimV / 8;  // of a row, one a lane, or two of wide heads
  constexpr int kLanes = kVectors <= 8 ? 8 : (kVectors <= 16 ? 16 : 32);
  constexpr int kVectorsOfLane = (kVectors + kLanes - 1) / kLanes;
  constexpr int kRowsOfPass = 32 / kLanes;
  constexpr int kPasses = kRangeRows / kRowsOfPass;
  int64_t const chunk = int64_t{blockIdx.x} * (kRangeThreads / 32) + threadIdx.x / 32;
  int64_t const chunks_q = range_chunks(params.batch, mask.seqlen_q, params.num_heads_q);
  int64_t const chunks_k = range_chunks(params.batch, mask.seqlen_k, params.num_heads_k);
  if (chunk >= chunks_q + chunks_k) return;
  bool const of_q = chunk < chunks_q;
  int64_t const index = of_q ? chunk : chunk - chunks_q;
  int const heads = of_q ? params.num_heads_q : params.num_heads_k;
  int const head = static_cast<int>(index % heads);
  int const batch = static_cast<int>(index / heads % params.batch);
  int const first = static_cast<int>(index / heads / params.batch) * kRangeRows;
  int const end = min(first + kRangeRows, of_q ? mask.length_q(batch) : mask.length_k(batch));
  Operand const& operand = of_q ? params.dout_rows : params.value_rows;
  int const lane = threadIdx.x % kLanes;
  uint4 vectors[kPasses][kVectorsOfLane];
  float longest = 0.f;
  float dlse = 0.f;
  CUTLASS_PRAGMA_UNROLL
  for (int pass = 0; pass < kPasses; ++pass) {
    int const row = first + pass * kRowsOfPass + static_cast<int>(threadIdx.x) % 32 / kLanes;
    bool const counts = row < end && !(of_q && mask.row_interval(batch, row).empty());
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kVectorsOfLane; ++v) {
      int const column = (v * kLanes + lane) * 8;
      bool const loaded = counts && column < params.head_dim_v;
      vectors[pass][v] = loaded ? load_vector(operand, batch, row, head, column) : uint4{};
    }
    if (of_q && counts && lane == 0 && params.dlse != nullptr) {
      int64_t const source = (int64_t{batch} * params.num_heads_q + head) * mask.seqlen_q + row;
      dlse = fmaxf(dlse, fabsf(params.dlse[source]));
    }
  }
  CUTLASS_PRAGMA_UNROLL
  for (int pass = 0; pass < kPasses; ++pass) {
    float sum = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kVectorsOfLane; ++v) {
      sum = dot8<Element>(vectors[pass][v], vectors[pass][v], sum);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int other = 1; other < kLanes; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
    longest = fmaxf(longest, sum);
  }
  CUTLASS_PRAGMA_UNROLL
  for (int other = kLanes; other < 32; other *= 2) {
    longest = fmaxf(longest, __shfl_xor_sync(~0u, longest, other));
    dlse = fmaxf(dlse, __shfl_xor_sync(~0u, dlse, other));
  }
  // With dropout dP and delta are larger by the scale of the weights that are kept, so in the bound
  // dO is.
  if constexpr (std::is_same_v<Params_, DropoutParams>) {
    if (of_q) longest *= params.dropout.scale * params.dropout.scale;
  }
  if (threadIdx.x % 32 == 0) {
    int const head_k = of_q ? head / params.group : head;
    uint32_t* const ranges =
        params.ranges + (int64_t{batch} * params.num_heads_k + head_k) * kNumRanges;
    atomicMax(ranges + (of_q ? kLongestdO : kLongestV), __float_as_uint(longest));
    if (of_q) atomicMax(ranges + kLargestdLse, __float_as_uint(dlse));
  }
}

}  // namespace jax_fa3::bwd
