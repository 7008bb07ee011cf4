// Online softmax of one consumer thread: parts of two rows of a warpgroup's 64-row tile.
//
// Accumulators of wgmma m64nN: a thread of lane l in warp w holds rows 16 w + l / 4 and that + 8,
// at columns 8 j + 2 (l % 4) + {0, 1}: element i has row (i / 2) % 2 and column 8 (i / 4) + i % 2.
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cute/tensor.hpp>

namespace jax_fa3 {

inline constexpr int kRowsPerThread = 2;

CUTLASS_DEVICE constexpr int fragment_row(int i) { return (i / 2) % 2; }
CUTLASS_DEVICE constexpr int fragment_column(int i) { return i / 4 * 8 + i % 2; }

// The four lanes that share a row are neighbours.
CUTLASS_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
CUTLASS_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Two fp32 values as neighbouring 16-bit elements of one register.
template <class Element>
CUTLASS_DEVICE uint32_t pack(float low, float high) {
  cutlass::Array<float, 2> const pair{low, high};
  auto const converted = cutlass::NumericArrayConverter<Element, float, 2>::convert(pair);
  return reinterpret_cast<uint32_t const&>(converted);
}

struct Softmax {
  float scale_log2;
  float row_max[kRowsPerThread] = {-INFINITY, -INFINITY};
  float row_sum[kRowsPerThread] = {0.f, 0.f};  // of this thread's columns only
  float rescale[kRowsPerThread] = {1.f, 1.f};  // of what was accumulated before the last update

  // Takes the scores of one more block into the running maximum.
  template <class Scores>
  CUTLASS_DEVICE void update_max(Scores const& scores) {
    float const previous[kRowsPerThread] = {row_max[0], row_max[1]};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      row_max[fragment_row(i)] = fmaxf(row_max[fragment_row(i)], scores(i));
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      row_max[row] = quad_max(row_max[row]);
      rescale[row] = exp2f(previous[row] * scale_log2 - offset(row));
      row_sum[row] *= rescale[row];
    }
  }

  // One of kParts equal parts of the scores becomes probabilities relative to the running maximum.
  template <int kPart, int kParts, class Scores>
  CUTLASS_DEVICE void exponentiate(Scores& scores) {
    float const offsets[kRowsPerThread] = {offset(0), offset(1)};
    constexpr int kSize = decltype(size(scores))::value;
    CUTLASS_PRAGMA_UNROLL
    for (int i = kSize / kParts * kPart; i < kSize / kParts * (kPart + 1); ++i) {
      scores(i) = exp2f(scores(i) * scale_log2 - offsets[fragment_row(i)]);
      row_sum[fragment_row(i)] += scores(i);
    }
  }

  template <class Out>
  CUTLASS_DEVICE void rescale_out(Out& out) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(out); ++i) out(i) *= rescale[fragment_row(i)];
  }

 private:
  // A row that has seen no key yet: -inf - -inf would be NaN.
  CUTLASS_DEVICE float offset(int row) const {
    return row_max[row] == -INFINITY ? 0.f : row_max[row] * scale_log2;
  }
};

}  // namespace jax_fa3
