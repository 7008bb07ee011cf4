// Online softmax where every block of scores has a scale of its own, and P will be e4m3.
#pragma once

#include "common/fragment.h"
#include "common/softmax.h"

namespace jax_fa3::fp8 {

// P = 2^(score - maximum + kShift): its 1 is 256, in the upper part of e4m3's range, so that small
// probabilities are not lost below it.
inline constexpr float kShift = 8.f;

// 4 fp32 values as neighbouring e4m3 elements; NaN stays NaN.
CUTLASS_DEVICE uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t result;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}"
      : "=r"(result)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return result;
}

struct Softmax {
  float scale_log2;                                        // of scores in their true size
  float row_max[kRowsPerThread] = {-INFINITY, -INFINITY};  // an exponent of base 2
  float row_sum[kRowsPerThread] = {0.f, 0.f};              // of this thread's columns only
  float rescale[kRowsPerThread] = {1.f, 1.f};  // of what was accumulated before the last update

  // Takes one more block's scores, each still to be multiplied by `scale` (base 2), into the
  // running maximum.
  template <class Scores>
  CUTLASS_DEVICE void update_max(Scores const& scores, float scale) {
    constexpr int kChains = 8;  // side by side, for a maximum waits for the one before it
    float chains[kChains];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      chains[i % kChains] = i < kChains ? scores(i) : fmaxf(chains[i % kChains], scores(i));
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      float const previous = row_max[row];
      float const* const part = chains + 2 * row;
      float const block_max = fmaxf(fmaxf(part[0], part[1]), fmaxf(part[4], part[5]));
      row_max[row] = fmaxf(previous, quad_max(block_max) * scale);
      rescale[row] = exp2f(previous - finite_max(row));
      row_sum[row] *= rescale[row];
    }
  }

  // One of kParts equal parts of the scores becomes probabilities relative to the running maximum.
  template <int kPart, int kParts, class Scores>
  CUTLASS_DEVICE void exponentiate(Scores& scores, float scale) {
    float const offsets[kRowsPerThread] = {kShift - finite_max(0), kShift - finite_max(1)};
    constexpr int kSize = decltype(size(scores))::value;
    CUTLASS_PRAGMA_UNROLL
    for (int i = kSize / kParts * kPart; i < kSize / kParts * (kPart + 1); ++i) {
      scores(i) = exp2f(scores(i) * scale + offsets[fragment_row(i)]);
      row_sum[fragment_row(i)] += scores(i);
    }
  }

 private:
  // Of a row that has seen no key yet: -inf - -inf would be NaN.
  CUTLASS_DEVICE float finite_max(int row) const {
    return row_max[row] == -INFINITY ? 0.f : row_max[row];
  }
};

}  // namespace jax_fa3::fp8
