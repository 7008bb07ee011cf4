// The Hadamard transform of rows that a warp holds in fragments, for quantize.cu.
#pragma once

#include <cute/arch/mma_sm80.hpp>

#include "common/fragment.h"
#include "fp8/quantize.h"

namespace jax_fa3::fp8 {

// The fragment of a warp: 8 rows by 32 columns, of which lane 4 r + q has the 8 columns from 8 q on
// of row r. A warp has several, next to each other until they fill a row, then below.
constexpr int kFragmentRows = 8;
constexpr int kFragmentColumns = 32;
constexpr int kFragments = 8;  // of a warp

// The Hadamard matrix over bits 0, 2, 3 and 4 of a column's number, as operand B of two
// mma.m16n8k16, each for half of the results. Row 8 w + 2 q + i of the matrix stands for column
// 8 q + 4 w + i of a fragment, or for that + 2. So the four registers that a lane has loaded are
// operand A as they are: bit 1 of the column is the upper bit of A's row.
template <class Element>
struct Hadamard16 {
  uint32_t operand_b[2][2];  // [half of the results][w]

  // With a transform of 16 columns, bit 4 is left out.
  __device__ explicit Hadamard16(int transform) {
    int const lane = threadIdx.x % 32;
    int const bits = transform < 32 ? 7 : 15;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        float entries[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int const row = lane % 4 << 2 | w << 1 | i;  // bits 4, 3, 2, 0 of its column
          int const column = lane / 8 << 2 | half << 1 | lane / 4 % 2;
          bool const zero = ((row ^ column) & ~bits) != 0;
          entries[i] = zero ? 0.f : __popc(row & column & bits) % 2 == 0 ? 1.f : -1.f;
        }
        operand_b[half][w] = pack<Element>(entries[0], entries[1]);
      }
    }
  }

  // A lane's 8 columns.
  __device__ void multiply(uint4 const& x, float (&out)[8]) const {
    using Mma = std::conditional_t<std::is_same_v<Element, cutlass::bfloat16_t>,
                                   cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                   cute::SM80_16x8x16_F32F16F16F32_TN>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const part = out + 4 * half;
      Mma::fma(part[0], part[1], part[2], part[3], x.x, x.y, x.z, x.w, operand_b[half][0],
               operand_b[half][1], 0.f, 0.f, 0.f, 0.f);
    }
  }
};

__device__ __forceinline__ void butterfly(float& a, float& b) {
  float const sum = a + b;
  b = a - b;
  a = sum;
}

// The steps of a Walsh-Hadamard transform of each `size` columns (a power of two from 16 on) that
// Hadamard16 leaves: over bit 1 of the column, and over the bits from 5 on.
template <int kFragmentsPerRow>
__device__ __forceinline__ void finish_hadamard(float (&x)[kFragments][8], int size) {
#pragma unroll
  for (int fragment = 0; fragment < kFragments; ++fragment) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if ((i & 2) == 0) butterfly(x[fragment][i], x[fragment][i + 2]);
    }
  }
#pragma unroll
  for (int step = 1; step < kFragmentsPerRow; step *= 2) {
    if (size >= 2 * step * kFragmentColumns) {
#pragma unroll
      for (int fragment = 0; fragment < kFragments; ++fragment) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if ((fragment & step) == 0) butterfly(x[fragment][i], x[fragment + step][i]);
        }
      }
    }
  }
}

// The sign bits of +1 and -1 in pairs, as they are in 16-bit elements: xor multiplies by the signs.
__device__ __forceinline__ uint4 sign_bits(Quantize const& p, int first_column) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int const column = first_column + 2 * i;
    bool const exists = column < p.head_dim;
    uint32_t const even = exists ? __float_as_uint(p.signs[column]) : 0;
    uint32_t const odd = exists ? __float_as_uint(p.signs[column + 1]) : 0;
    pairs[i] = (even & 0x80000000u) >> 16 | (odd & 0x80000000u);
  }
  return uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
}

}  // namespace jax_fa3::fp8
