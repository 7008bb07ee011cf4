// Online softmax of one consumer thread: parts of two rows of a warpgroup's 64-row tile.
#pragma once

#include "common/fragment.h"
#include "common/mask.h"

namespace jax_fa3 {

// The four lanes that share a row are neighbours.
CUTLASS_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
CUTLASS_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

CUTLASS_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Sets scores outside [begin, end) to -inf; `column` is the key index of the thread's column 0. One
// bit per element of a row is made first: testing it costs a third of comparing the column twice.
// A broken row may wrap around here: the epilogue overwrites it.
template <class Scores>
CUTLASS_DEVICE void mask_scores(Scores& scores, Interval const (&rows)[kRowsPerThread],
                                int column) {
  static_assert(decltype(size(scores))::value <= 32 * kRowsPerThread);
  auto const bits_before = [](int key) {  // a row's elements before a key: columns 0, 1, 8, 9, ...
    int const elements = key <= 0 ? 0 : key / 8 * 2 + min(key % 8, 2);
    return elements >= 32 ? ~0u : (1u << elements) - 1;
  };
  uint32_t visible[kRowsPerThread];
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    visible[row] = bits_before(rows[row].end - column) & ~bits_before(rows[row].begin - column);
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(scores); ++i) {
    int const element = i / 4 * 2 + i % 2;
    scores(i) = visible[fragment_row(i)] >> element & 1 ? scores(i) : -INFINITY;
  }
}

struct Softmax {
  float scale_log2;
  float row_max[kRowsPerThread] = {-INFINITY, -INFINITY};
  float row_sum[kRowsPerThread] = {0.f, 0.f};  // of this thread's columns only
  float rescale[kRowsPerThread] = {1.f, 1.f};  // of what was accumulated before the last update
  static constexpr float out_unit = 1.f;       // what the accumulated output counts in

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
