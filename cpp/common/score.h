// Scores: x = q.k becomes an exponent of base 2, softmax_scale_log2 * x, or with a soft cap
// softmax_scale_log2 * tanh(cap_scale * x). What stands between x and that factor is here, for the
// forward, the backward and dQ alike. Kernels apply it where they mask; a call that has a soft cap
// takes all its blocks for masked. (What is added to x, and the gradients of that, are in bias.h,
// alibi.h and relative_bias.h.)
#pragma once

#include <cutlass/cutlass.h>

#include <limits>

#include "problem.h"

namespace jax_fa3 {

inline constexpr float kLog2E = 1.44269504f;

struct Score {
  float cap_scale;  // 0: no soft cap

  // What the soft cap makes of x, and the derivative by cap_scale * x where that is `capped`.
  CUTLASS_DEVICE float cap(float x) const {
    float capped;
    asm("tanh.approx.f32 %0, %1;" : "=f"(capped) : "f"(x * cap_scale));
    return capped;
  }
  CUTLASS_DEVICE static float cap_grad(float capped) { return 1.f - capped * capped; }

  // The same of a fragment, in place, each of whose scores counts `scale` times (FP8).
  template <class Scores>
  CUTLASS_DEVICE void cap_all(Scores& scores, float scale = 1.f) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) scores(i) = Score{scale * cap_scale}.cap(scores(i));
  }

  // A fragment's x to what the exponents take, whether there is a soft cap or not.
  template <class Scores>
  CUTLASS_DEVICE void apply(Scores& scores, float scale = 1.f) const {
    if (cap_scale != 0.f) {
      cap_all(scores, scale);
    } else {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(scores); ++i) scores(i) *= scale;
    }
  }
};

// Of a problem: softmax_scale, in base e, as the exponents count it (with a soft cap it is the
// cap), and what it multiplies.
struct ScoreScale {
  float softmax_scale;
  Score score;
};

inline ScoreScale score_scale(Problem const& problem) {
  // Beyond this cap tanh(x) is x for every score there is, and cap_scale would be flushed to 0.
  float const cap_scale = problem.soft_cap == 0.f ? 0.f : problem.softmax_scale / problem.soft_cap;
  bool const capped = cap_scale >= std::numeric_limits<float>::min();
  return capped ? ScoreScale{problem.soft_cap, {cap_scale}}
                : ScoreScale{problem.softmax_scale, {0.f}};
}

}  // namespace jax_fa3
