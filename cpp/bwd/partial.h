// dK and dV from partial results: where several CTAs share the query rows that see a block of keys,
// or where those rows are too many for one sum in the accumulators (plan.h's kMostRowsOfSum). Every
// CTA accumulates its own in fp32 arrays of its own in global memory, and a kernel after it adds up
// the arrays of all CTAs. So every sum has one order, without atomics.
#pragma once

#include "bwd/epilogue.h"
#include "bwd/rows.h"

namespace jax_fa3::bwd {

// The arrays of a split: dK and dV side by side, [b, s, k, h + v].
CUTLASS_DEVICE Operand dkv_partial(Params const& params, int split, bool of_value) {
  int64_t const columns = params.head_dim + params.head_dim_v;
  int64_t const row = columns * params.num_heads_k;
  int64_t const entry = row * params.mask.seqlen_k;
  float* const data = params.dkv_partial + split * entry * params.batch;
  return {data + (of_value ? params.head_dim : 0), entry, row, columns};
}

// Adds what the accumulators hold to the split's array, or writes it there if it is the first.
template <class Fragment>
CUTLASS_DEVICE void accumulate_partial(Fragment& grad, Operand const& out, GradRows const& rows,
                                       int columns, bool first) {
  if (!first) {
    float const* const head = static_cast<float const*>(out.data) +
                              rows.tile.batch * out.batch_stride + rows.tile.head * out.head_stride;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(grad); i += 2) {
      int const row = rows.of_thread() + fragment_row(i) * 8;
      int const column = fragment_column(i) + threadIdx.x % 4 * 2;
      if (row >= rows.seqlen || column >= columns) continue;
      auto const sum = *reinterpret_cast<float2 const*>(head + row * out.seqlen_stride + column);
      grad(i) += sum.x;
      grad(i + 1) += sum.y;
    }
  }
  store_grad_fp32(grad, out, rows, columns);
}

// The same of a gradient that the warpgroup holds transposed.
template <class Fragment>
CUTLASS_DEVICE void accumulate_transposed(Fragment& grad, Operand const& out, GradRows const& rows,
                                          int columns, bool first) {
  if (!first) {
    for_each_transposed(grad, out, rows, columns, [](float& x, float place) { x += place; });
  }
  store_transposed_fp32(grad, out, rows, columns);
}

inline constexpr int kPartialThreads = 256;

// A thread for 8 columns of a row of dK or dV.
template <class Element>
__global__ void __launch_bounds__(kPartialThreads)
    sum_partial_kernel(__grid_constant__ Params const params) {
  int const vectors = (params.head_dim + params.head_dim_v) / 8;
  int64_t const rows = int64_t{params.batch} * params.mask.seqlen_k * params.num_heads_k;
  int64_t const index = int64_t{blockIdx.x} * kPartialThreads + threadIdx.x;
  if (index >= rows * vectors) return;
  int64_t const size = rows * vectors * 8;  // of a split
  float sum[8] = {};
  for (int split = 0; split < params.num_splits; ++split) {
    auto const* const part =
        reinterpret_cast<float4 const*>(params.dkv_partial + split * size + index * 8);
    float4 const low = part[0];
    float4 const high = part[1];
    float const values[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    for (int i = 0; i < 8; ++i) sum[i] += values[i];
  }
  int const column = static_cast<int>(index % vectors) * 8;
  int64_t const row = index / vectors;
  int const head = static_cast<int>(row % params.num_heads_k);
  int64_t const key = row / params.num_heads_k % params.mask.seqlen_k;
  int64_t const batch = row / params.num_heads_k / params.mask.seqlen_k;
  bool const of_value = column >= params.head_dim;
  Operand const& out = of_value ? params.dvalue_rows : params.dkey_rows;
  int64_t const offset = batch * out.batch_stride + key * out.seqlen_stride +
                         head * out.head_stride + column - (of_value ? params.head_dim : 0);
  if (params.dkv_fp32) {
    auto* const target = reinterpret_cast<float4*>(static_cast<float*>(out.data) + offset);
    target[0] = float4{sum[0], sum[1], sum[2], sum[3]};
    target[1] = float4{sum[4], sum[5], sum[6], sum[7]};
  } else {
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out.data) + offset) =
        uint4{pack<Element>(sum[0], sum[1]), pack<Element>(sum[2], sum[3]),
              pack<Element>(sum[4], sum[5]), pack<Element>(sum[6], sum[7])};
  }
}

}  // namespace jax_fa3::bwd
