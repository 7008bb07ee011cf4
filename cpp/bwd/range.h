// fp16 alone: the power of 2 that brings dS into its range.
//
// |dS| <= P (|dO| |V| + |delta|), by row norms, so a bound for a KV head and its query heads
// follows from the longest row of dO and of V and the largest |dlse|. Without it dS of small
// cotangents is below fp16's range, and that of large ones above. bf16 has the range of fp32.
// range_kernel() looks at V; preprocess, which reads dO anyway, at the rest, and so it leaves delta
// as it is, for scale_delta_kernel().
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

// Whether the numbers of a KV head, ranges_of(), are to be found.
template <class Element>
CUTLASS_HOST_DEVICE bool has_ranges(Params const& params) {
  return std::is_same_v<Element, cutlass::half_t> && params.ranges != nullptr;
}
CUTLASS_DEVICE uint32_t* ranges_of(Params const& params, int batch, int head_k) {
  return params.ranges + (int64_t{batch} * params.num_heads_k + head_k) * kNumRanges;
}

// What dS is multiplied by. It is 1 where `ranges` is null, as where dQ is accumulated over several
// calls: they must have one scale.
template <class Element>
CUTLASS_DEVICE float ds_scale(Params const& params, int batch, int head_k) {
  if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    if (params.ranges == nullptr) return 1.f;
    uint32_t const* const ranges = ranges_of(params, batch, head_k);
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

// A warp takes kRangeRows rows of V of a head, whose loads are under way at once, and then needs
// one atomic for all of them.
template <class Element, int kHeadDimV, class Params_ = Params>
__global__ void __launch_bounds__(kRangeThreads)
    range_kernel(__grid_constant__ Params_ const params) {
  Mask const& mask = params.mask;
  constexpr int kVectors = kHeadDimV / 8;  // of a row, one a lane, or two of wide heads
  constexpr int kLanes = kVectors <= 8 ? 8 : (kVectors <= 16 ? 16 : 32);
  constexpr int kVectorsOfLane = (kVectors + kLanes - 1) / kLanes;
  constexpr int kRowsOfPass = 32 / kLanes;
  constexpr int kPasses = kRangeRows / kRowsOfPass;
  int const chunk = static_cast<int>(blockIdx.x * (kRangeThreads / 32) + threadIdx.x / 32);
  int const head = chunk % params.num_heads_k;
  int const batch = chunk / params.num_heads_k % params.batch;
  int const first = chunk / params.num_heads_k / params.batch * kRangeRows;
  if (first >= mask.seqlen_k) return;
  int const end = min(first + kRangeRows, mask.length_k(batch));
  int const lane = threadIdx.x % kLanes;
  uint4 vectors[kPasses][kVectorsOfLane];
  CUTLASS_PRAGMA_UNROLL
  for (int pass = 0; pass < kPasses; ++pass) {
    int const row = first + pass * kRowsOfPass + static_cast<int>(threadIdx.x) % 32 / kLanes;
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kVectorsOfLane; ++v) {
      int const column = (v * kLanes + lane) * 8;
      bool const loaded = row < end && column < params.head_dim_v;
      vectors[pass][v] =
          loaded ? load_vector(params.value_rows, batch, row, head, column) : uint4{};
    }
  }
  float longest = 0.f;
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
  }
  // With dropout dP and delta are larger by the scale of the weights that are kept. dP counts V.
  if constexpr (std::is_same_v<Params_, DropoutParams>) {
    longest *= params.dropout.scale * params.dropout.scale;
  }
  if (threadIdx.x % 32 == 0) {
    atomicMax(ranges_of(params, batch, head) + kLongestV, __float_as_uint(longest));
  }
}

// A thread's number is at least 0. Their maximum, by atomics, of which a warp makes one.
CUTLASS_DEVICE void add_to_range(uint32_t* range, float of_thread) {
  uint32_t const largest = __reduce_max_sync(~0u, __float_as_uint(of_thread));
  if (threadIdx.x % 32 == 0 && largest > *range) atomicMax(range, largest);
}

// Behind preprocess, with a thread for each row of each head.
template <class Element, int kBlockM>
__global__ void __launch_bounds__(kRangeThreads)
    scale_delta_kernel(__grid_constant__ Params const params) {
  int64_t const index = int64_t{blockIdx.x} * kRangeThreads + threadIdx.x;
  int64_t const block = index / kBlockM;
  int64_t const of_head = block / params.num_m_blocks;
  int const batch = static_cast<int>(of_head / params.num_heads_q);
  if (batch >= params.batch) return;
  int const head = static_cast<int>(of_head % params.num_heads_q);
  using Stats = RowStats<kBlockM>;
  params.row_stats[block * Stats::kSize + Stats::kDelta + index % kBlockM] *=
      ds_scale<Element>(params, batch, head / params.group);
}

}  // namespace jax_fa3::bwd
