// A tile's keys shared by several CTAs, where tiles alone would leave SMs without work.
//
// Each CTA takes a part of the tile's blocks and leaves O, divided by its own row sums, and the
// log-sum-exp in fp32 in memory, as if the batch were so many times as large. A kernel after it
// joins the parts, in one order.
#pragma once

#include "common/fragment.h"
#include "fwd/params.h"
#include "problem.h"

namespace jax_fa3::fwd {

// What of a tile's blocks, of num_blocks in all, the CTA goes through whose tile is of this batch
// entry.
CUTLASS_DEVICE BlockRange part_of_split(ManyParams const& params, int batch, int num_blocks,
                                        BlockRange blocks) {
  int const split = batch / params.batch;
  int const first = split * num_blocks / params.num_splits;
  int const end = (split + 1) * num_blocks / params.num_splits;
  return {max(blocks.begin, first), max(blocks.full_begin, first), min(blocks.full_end, end),
          min(blocks.end, end)};
}

// The parts, and what becomes of them.
struct Parts {
  float const* out;      // [splits, b, t, n, v]
  float const* lse;      // [splits, b, n, t]
  float const* lse_low;  // the same
  int num_splits;
  int batch, seqlen_q, num_heads_q, head_dim_v;
  Operand joined;         // [b, t, n, v]
  float* joined_lse;      // [b, n, t]
  float* joined_lse_low;  // [b, n, t] or null
};

inline constexpr int kJoinThreads = 256;

// A thread for 8 columns of a row of O. It may start while the parts are being computed.
template <class Element>
__global__ void __launch_bounds__(kJoinThreads) join_parts_kernel(__grid_constant__ Parts const p) {
  int const vectors = p.head_dim_v / 8;
  int64_t const rows = int64_t{p.batch} * p.seqlen_q * p.num_heads_q;
  int64_t const index = int64_t{blockIdx.x} * kJoinThreads + threadIdx.x;
  cudaGridDependencySynchronize();
  if (index >= rows * vectors) return;
  int const vector = static_cast<int>(index % vectors);
  int64_t const row = index / vectors;  // of [b, t, n]
  int const head = static_cast<int>(row % p.num_heads_q);
  int const position = static_cast<int>(row / p.num_heads_q % p.seqlen_q);
  int const batch = static_cast<int>(row / p.num_heads_q / p.seqlen_q);
  int64_t const of_lse = (int64_t{batch} * p.num_heads_q + head) * p.seqlen_q + position;

  // Log-sum-exps in base 2, each in two numbers, relative to the first number of the greatest.
  float top = -INFINITY;
  for (int split = 0; split < p.num_splits; ++split) {
    top = fmaxf(top, p.lse[split * rows + of_lse]);
  }
  float const top_2 = __fmul_rn(top, kLog2E);
  float sum = 0.f;
  float values[8] = {};
  for (int split = 0; split < p.num_splits; ++split) {
    float const lse = p.lse[split * rows + of_lse];
    if (lse == -INFINITY) continue;  // a part without keys
    float const weight = exp2f(__fmul_rn(lse, kLog2E) - top_2 + p.lse_low[split * rows + of_lse]);
    sum += weight;
    auto const* const part =
        reinterpret_cast<float4 const*>(p.out + (split * rows + row) * p.head_dim_v + vector * 8);
    float4 const first = part[0];
    float4 const second = part[1];
    float const numbers[] = {first.x,  first.y,  first.z,  first.w,
                             second.x, second.y, second.z, second.w};
    for (int i = 0; i < 8; ++i) values[i] += weight * numbers[i];
  }
  uint32_t packed[4];
  for (int i = 0; i < 4; ++i) {
    packed[i] = pack<Element>(values[2 * i] / sum, values[2 * i + 1] / sum);
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.joined.data) + batch * p.joined.batch_stride +
                            position * p.joined.seqlen_stride + head * p.joined.head_stride +
                            vector * 8) = uint4{packed[0], packed[1], packed[2], packed[3]};
  if (vector != 0) return;
  float const lse = top + logf(sum);
  p.joined_lse[of_lse] = lse;
  if (p.joined_lse_low != nullptr) {
    p.joined_lse_low[of_lse] = top_2 - __fmul_rn(lse, kLog2E) + log2f(sum);
  }
}

}  // namespace jax_fa3::fwd
