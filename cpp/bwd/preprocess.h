// What the main kernels need to know of each query row: the log-sum-exp, delta and the keys it
// sees. delta = rowsum(dO * O) - dlse: the gradient that comes in through the log-sum-exp takes the
// same way, for its derivative by the scores is P itself.
#pragma once

#include "bwd/params.h"
#include "common/fragment.h"
#include "common/launch.h"

namespace jax_fa3::bwd {

inline constexpr int kPreprocessThreads = 256;

// 16 bytes of each operand, multiplied.
template <class Element>
CUTLASS_DEVICE float dot8(uint4 a, uint4 b) {
  uint32_t const x[] = {a.x, a.y, a.z, a.w};
  uint32_t const y[] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 4; ++i) {
    sum += unpack<Element>(x[i], 0) * unpack<Element>(y[i], 0);
    sum += unpack<Element>(x[i], 1) * unpack<Element>(y[i], 1);
  }
  return sum;
}

CUTLASS_DEVICE uint4 load_vector(Operand const& operand, int batch, int row, int head, int column) {
  auto const* const data = static_cast<uint16_t const*>(operand.data);
  return *reinterpret_cast<uint4 const*>(data + batch * operand.batch_stride +
                                         row * operand.seqlen_stride + head * operand.head_stride +
                                         column);
}

// One CTA per block of query rows and head. kAccumulators: fp32 numbers of the block's dQ to clear.
template <class Element, int kBlockM, int kHeadDimV, int kAccumulators>
__global__ void __launch_bounds__(kPreprocessThreads)
    preprocess_kernel(__grid_constant__ Params const params) {
  int const m_block = blockIdx.x % params.num_m_blocks;
  int const head = blockIdx.x / params.num_m_blocks % params.num_heads_q;
  int const batch = blockIdx.x / params.num_m_blocks / params.num_heads_q;
  int const first_row = m_block * kBlockM;
  int64_t const index = params.m_block_index(batch, head, m_block);
  Mask const& mask = params.mask;

  if constexpr (kAccumulators > 0) {
    auto* const sum = reinterpret_cast<float4*>(params.dq_accum + index * kAccumulators);
    int const cleared = params.continues_dq ? 0 : kAccumulators / 4;
    for (int i = threadIdx.x; i < cleared; i += kPreprocessThreads) {
      sum[i] = float4{0.f, 0.f, 0.f, 0.f};
    }
    if (params.turns != nullptr && threadIdx.x == 0) params.turns[index] = 0;
  }

  if (head == 0 && threadIdx.x < 32) {
    IntervalHull hull;
    for (int row = threadIdx.x; row < kBlockM; row += 32) {
      Interval const interval = mask.row_interval(batch, first_row + row);
      hull.add(interval);
      params.row_intervals[(int64_t{batch} * params.num_m_blocks + m_block) * kBlockM + row] =
          interval.empty() ? int2{0, 0} : int2{interval.begin, interval.end};
    }
    hull.reduce_warp();
    if (threadIdx.x == 0) {
      params.block_hulls[int64_t{batch} * params.num_m_blocks + m_block] =
          int4{hull.min_begin, hull.max_begin, hull.min_end, hull.max_end};
    }
  }

  // A row's vectors of 8 elements, one a lane.
  constexpr int kVectors = kHeadDimV / 8;
  constexpr int kLanes = kVectors <= 8 ? 8 : (kVectors <= 16 ? 16 : 32);
  int const column = threadIdx.x % kLanes * 8;
  for (int row = threadIdx.x / kLanes; row < kBlockM; row += kPreprocessThreads / kLanes) {
    // Rows without keys may hold anything. Their probabilities are exp2(score - inf) = 0.
    bool const sees = !mask.row_interval(batch, first_row + row).empty();
    float delta = 0.f;
    if (sees && column < params.head_dim_v && params.out.data != nullptr) {
      delta = dot8<Element>(load_vector(params.out, batch, first_row + row, head, column),
                            load_vector(params.dout_rows, batch, first_row + row, head, column));
    }
    CUTLASS_PRAGMA_UNROLL
    for (int lane = 1; lane < kLanes; lane *= 2) delta += __shfl_xor_sync(~0u, delta, lane);
    if (threadIdx.x % kLanes == 0) {
      int64_t const source =
          (int64_t{batch} * params.num_heads_q + head) * mask.seqlen_q + first_row + row;
      float* const stats = params.row_stats + index * (2 * kBlockM) + row;
      stats[0] = sees ? params.lse[source] * kLog2E : INFINITY;
      stats[kBlockM] = sees ? delta - params.dlse[source] : 0.f;
    }
  }
}

}  // namespace jax_fa3::bwd
