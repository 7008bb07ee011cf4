// Writes what the other kernels need of each query row: the log-sum-exp, delta and the keys it sees
// (params.h). delta = rowsum(dO * O) - dlse: the derivative of the log-sum-exp by the scores is P
// itself, so its gradient enters dS = P (dP - delta) as a part of delta. A sink is a score like the
// others, but its value is 0, and so is its dP: here are all rows that its gradient is the sum of.
#pragma once

#include "bwd/params.h"
#include "bwd/range.h"
#include "bwd/rows.h"
#include "common/score.h"

namespace jax_fa3::bwd {

inline constexpr int kPreprocessThreads = 256;
// CTAs that an SM is to have registers for, for __launch_bounds__; 0: as the compiler likes, which
// spills at head dim 512.
constexpr int preprocess_ctas(int head_dim_v) { return head_dim_v > 256 ? 2 : 0; }

// Stores what a block of rows adds to the gradient of its head's sink, of which each thread has a
// part.
CUTLASS_DEVICE void store_dsink(Params const& params, int64_t batch, int head, int m_block,
                                float dsink) {
  __shared__ float of_warps[kPreprocessThreads / 32];
  CUTLASS_PRAGMA_UNROLL
  for (int lane = 1; lane < 32; lane *= 2) dsink += __shfl_xor_sync(~0u, dsink, lane);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = dsink;
  __syncthreads();
  float* const blocks = params.dsinks + (batch * params.num_heads_q + head) * params.dsinks_blocks;
  if (threadIdx.x == 0) {
    float sum = 0.f;
    for (float const x : of_warps) sum += x;
    blocks[m_block] = sum;
  }
  if (m_block + 1 < params.num_m_blocks) return;
  for (int i = params.num_m_blocks + threadIdx.x; i < params.dsinks_blocks;
       i += kPreprocessThreads) {
    blocks[i] = 0.f;
  }
}

// One CTA per block of query rows and head. kAccumulators: fp32 numbers of the block's dQ, which
// are cleared here only where blocks that no key sees must hold a sum, too.
template <class Element, int kBlockM, int kHeadDimV, int kAccumulators>
__global__ void __launch_bounds__(kPreprocessThreads, preprocess_ctas(kHeadDimV))
    preprocess_kernel(__grid_constant__ Params const params) {
  // Heads first: what CTAs read at the same time lies side by side in memory.
  int const head = blockIdx.x % params.num_heads_q;
  int const m_block = blockIdx.x / params.num_heads_q % params.num_m_blocks;
  int const batch = blockIdx.x / params.num_m_blocks / params.num_heads_q;
  int const first_row = m_block * kBlockM;
  int64_t const index = params.m_block_index(batch, head, m_block);
  Mask const& mask = params.mask;

  // While the first rows are being loaded.
  auto const clear_sum = [&] {
    if constexpr (kAccumulators > 0) {
      auto* const sum = reinterpret_cast<float4*>(params.dq_accum + index * kAccumulators);
      int const cleared = params.clears_dq() ? kAccumulators / 4 : 0;
      for (int i = threadIdx.x; i < cleared; i += kPreprocessThreads) {
        sum[i] = float4{0.f, 0.f, 0.f, 0.f};
      }
      if (params.turns != nullptr && threadIdx.x == 0) params.turns[index] = 0;
    }
  };

  // A row's vectors of 8 elements, one a lane, or two of wide heads; three of 24, which would leave
  // a quarter of 32 lanes idle.
  constexpr int kVectors = kHeadDimV / 8;
  constexpr int kLanes = kVectors <= 8 || kVectors == 24 ? 8 : (kVectors <= 16 ? 16 : 32);
  constexpr int kRowsOfPass = kPreprocessThreads / kLanes;
  // Rows whose loads are under way at once.
  constexpr int kAtOnce = cute::min(kVectors <= 32 ? 4 : 2, kBlockM / kRowsOfPass);
  static_assert(kBlockM % (kAtOnce * kRowsOfPass) == 0 && kAtOnce <= kLanes);
  int const lane = threadIdx.x % kLanes;
  using Stats = RowStats<kBlockM>;
  float* const stats = params.row_stats + index * Stats::kSize;
  bool const ranged = has_ranges<Element>(params);
  float longest = 0.f;  // row of dO, squared
  float largest_dlse = 0.f;
  // An error of a log-sum-exp (base 2), and so of P, that is far below the rounding to 16 bits.
  constexpr float kNegligible = 1.f / 8192;
  bool careful = false;
  bool const has_sink = params.heads.sinks.data != nullptr;
  float const sink = has_sink ? params.heads.sinks(batch, head) * kLog2E : 0.f;
  float dsink = 0.f;
  for (int first = 0; first < kBlockM; first += kAtOnce * kRowsOfPass) {
    constexpr int kVectorsOfLane = (kVectors + kLanes - 1) / kLanes;
    uint4 out[kAtOnce][kVectorsOfLane], dout[kAtOnce][kVectorsOfLane];
    auto const row_of = [&](int r) { return first + r * kRowsOfPass + int(threadIdx.x) / kLanes; };
    // Each row has its own lane for what is one number a row.
    int const row = row_of(lane);
    bool const writes = lane < kAtOnce;
    bool const has_row = writes && first_row + row < mask.seqlen_q;
    int64_t const source =
        (int64_t{batch} * params.num_heads_q + head) * mask.seqlen_q + first_row + row;
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < kAtOnce; ++r) {
      int const row_in_array = first_row + row_of(r);
      bool const exists = row_in_array < mask.seqlen_q;
      CUTLASS_PRAGMA_UNROLL
      for (int v = 0; v < kVectorsOfLane; ++v) {
        int const column = (v * kLanes + lane) * 8;
        bool const has_column = exists && column < params.head_dim_v;
        bool const loaded = has_column && params.out.data != nullptr;
        out[r][v] = loaded ? load_vector(params.out, batch, row_in_array, head, column) : uint4{};
        dout[r][v] = loaded || (has_column && ranged)
                         ? load_vector(params.dout_rows, batch, row_in_array, head, column)
                         : uint4{};
      }
    }
    float const lse = has_row ? params.lse[source] : 0.f;
    float const low = has_row && params.lse_low != nullptr ? params.lse_low[source] : 0.f;
    float const dlse = has_row && params.dlse != nullptr ? params.dlse[source] : 0.f;
    bool const sees = writes && !mask.row_interval(batch, first_row + row).empty();
    if (first == 0) clear_sum();
    float delta = 0.f;  // of the lane's row
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < kAtOnce; ++r) {
      float product = 0.f;
      float length = 0.f;
      CUTLASS_PRAGMA_UNROLL
      for (int v = 0; v < kVectorsOfLane; ++v) {
        product = dot8<Element>(out[r][v], dout[r][v], product);
        if (ranged) length = dot8<Element>(dout[r][v], dout[r][v], length);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int other = 1; other < kLanes; other *= 2) {
        product += __shfl_xor_sync(~0u, product, other);
        if (ranged) length += __shfl_xor_sync(~0u, length, other);
      }
      if (lane == r) delta = product;
      if (ranged && lane == r && sees) longest = fmaxf(longest, length);
    }
    if (!writes) continue;
    // Rows without keys may hold anything. Their probabilities are exp2(score - inf) = 0.
    float const lost = sees ? low : 0.f;
    careful |= fabsf(lost) > kNegligible;
    float const rounded = sees ? __fmul_rn(lse, kLog2E) : INFINITY;
    delta = sees ? delta - dlse : 0.f;
    if (ranged && sees) largest_dlse = fmaxf(largest_dlse, fabsf(dlse));
    stats[Stats::kLse + row] = rounded;
    stats[Stats::kDelta + row] = delta;
    stats[Stats::kLseLow + row] = lost;
    if (has_sink) dsink -= exp2f(sink - rounded - lost) * delta;
  }

  if (head == 0 && threadIdx.x < 32) {
    QueryBlock block{};
    for (int i = 0; i < kBlockM / 32; ++i) {
      int const row = i * 32 + threadIdx.x;
      Interval const interval = mask.row_interval(batch, first_row + row);
      block.hull.add(interval);
      // Not rows past the array's end: TMA writes zeros there.
      block.blind.bits[i] = __ballot_sync(~0u, interval.empty() && first_row + row < mask.seqlen_q);
      params.row_intervals[(int64_t{batch} * params.num_m_blocks + m_block) * kBlockM + row] =
          interval.empty() ? int2{0, 0} : int2{interval.begin, interval.end};
    }
    block.hull.reduce_warp();
    if (threadIdx.x == 0) params.blocks_of(batch)[m_block] = block;
  }
  // The hull of this block and those after it: where it begins and ends.
  if (head == 0 && m_block % kBlocksOfHull == 0) {
    __shared__ Interval of_warps[kPreprocessThreads / 32];
    IntervalHull hull;
    int const rows = min(kBlocksOfHull * kBlockM, mask.seqlen_q - first_row);
    for (int row = threadIdx.x; row < rows; row += kPreprocessThreads) {
      hull.add(mask.row_interval(batch, first_row + row));
    }
    hull.reduce_warp();
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = {hull.min_begin, hull.max_end};
    __syncthreads();
    if (threadIdx.x == 0) {
      for (Interval const& of_warp : of_warps) hull.add(of_warp);
      params.blocks_of(batch)[params.num_m_blocks + m_block / kBlocksOfHull].hull = hull;
    }
  }

  int const any = __syncthreads_or(careful);
  if (threadIdx.x == 0) stats[Stats::kCareful] = __int_as_float(any);
  if constexpr (kAccumulators > 0) {
    bool const holds_sum = params.accumulates_dq || params.clears_dq();
    if (threadIdx.x == 0) stats[Stats::kSum] = __int_as_float(holds_sum ? kSumHeld : kNoSum);
    if (threadIdx.x == 0 && index == 0) stats[Stats::kTaken] = __int_as_float(0);
  }
  if (ranged) {
    uint32_t* const ranges = ranges_of(params, batch, head / params.group);
    add_to_range(ranges + kLongestdO, longest);
    add_to_range(ranges + kLargestdLse, largest_dlse);
  }
  if (has_sink) store_dsink(params, batch, head, m_block, dsink);
}

}  // namespace jax_fa3::bwd
