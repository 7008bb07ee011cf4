// Dropout in the backward, on S^T and dP^T: dV takes the weights that are left, and dS = P (dP -
// delta) has dP of those alone. That a weight is dropped is kept in its P, which is never negative,
// as the sign: so it needs no registers. At head dim 128 that is found beside dP's GEMM.
#pragma once

#include "bwd/scores.h"
#include "common/dropout.h"

namespace jax_fa3::bwd {

// The states of a step, in shared memory: of the 64 keys of each consumer warpgroup those of each
// pair of query rows; and the head's words.
template <int kBlockM>
struct alignas(16) DropoutStates {
  uint2 states[2][kBlockM / 2];
  uint2 head;

  // By a warp.
  CUTLASS_DEVICE void write(Dropout const& dropout, uint2 of_head, int n_block, int first_row) {
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = threadIdx.x % 32; i < kBlockM; i += 32) {
      auto const state = DropoutState::of(dropout, of_head, n_block * 2 + i / (kBlockM / 2),
                                          first_row / 2 + i % (kBlockM / 2));
      states[0][i] = {state.word, state.threshold};
    }
    if (threadIdx.x % 32 == 0) head = of_head;
    __syncwarp();
  }
};

// What a consumer thread's keys multiply by.
CUTLASS_DEVICE uint32_t multiplier_of_key(Dropout const& dropout, int key) {
  return dropout.quads[key / 2 % 4] ^ dropout.places[key % kDropoutKeys / 16 * 2 + key % 2];
}

// Calls visit(i, word) for every element of S^T of a step, bit 31 being set where its weight is
// kept.
template <int kSize, class States, class Visit>
CUTLASS_DEVICE void visit_kept(States const& of_step, int warpgroup, uint32_t multiplier,
                               Visit const& visit) {
  uint2 const head = of_step.head;
  auto const* const states = reinterpret_cast<uint4 const*>(of_step.states[warpgroup]);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kSize; i += 8) {  // 16 query rows
    uint4 const two = states[i / 2 + threadIdx.x % 4];
    uint32_t const found[2] = {keeps({two.x, two.y}, head, multiplier),
                               keeps({two.z, two.w}, head, multiplier)};
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < 8; ++e) visit(i + e, found[e % 2] << (24 - e / 2 * 8));
  }
}

// Marks dropped weights: by the sign of P, or with a soft cap, where P is found later, by the last
// bit of what is there.
template <class States, class Scores>
CUTLASS_DEVICE void mark_dropped(Params const& params, States const& states, int warpgroup,
                                 uint32_t multiplier, Scores& p) {
  constexpr int kSize = decltype(size(p))::value;
  if (params.score.cap_scale == 0.f) {
    visit_kept<kSize>(states, warpgroup, multiplier, [&](int i, uint32_t word) {
      p(i) = __uint_as_float(__float_as_uint(p(i)) | (~word & 0x80000000u));
    });
  } else {
    visit_kept<kSize>(states, warpgroup, multiplier, [&](int i, uint32_t word) {
      p(i) = __uint_as_float((__float_as_uint(p(i)) & ~1u) | (~word >> 31));
    });
  }
}

// What dS is computed in units of, which saves a product a weight: half of what the weights that
// are left are multiplied by. (In fp16, whose range is small, dS has a factor of its own: range.h.)
template <class Element>
inline constexpr bool kHasDsUnit = std::is_same_v<Element, cutlass::bfloat16_t>;
template <class Element>
CUTLASS_HOST_DEVICE float ds_unit(Dropout const& dropout) {
  return kHasDsUnit<Element> ? 0.5f * dropout.scale : 1.f;
}

// What dP and delta are multiplied by: of marked P.
struct DropoutScales {
  float left, delta;

  template <class Element>
  CUTLASS_DEVICE static DropoutScales of(DropoutParams const& params, float ds_scale) {
    return kHasDsUnit<Element> ? DropoutScales{2.f, params.twice_kept}
                               : DropoutScales{ds_scale * params.dropout.scale, 1.f};
  }

  // Calls visit(i, delta) for every element of dP^T.
  template <int kSize, class Records, class Visit>
  CUTLASS_DEVICE void visit_deltas(Records const& records, Visit const& visit) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; i += 4) {
      float2 const pair = records.delta_of(i);
      float2 const scaled{pair.x * delta, pair.y * delta};
      CUTLASS_PRAGMA_UNROLL
      for (int e = 0; e < 4; ++e) visit(i + e, Records::of(scaled, e));
    }
  }
};

// score_grads() of marked P.
template <class Records, class Scores>
CUTLASS_DEVICE void dropped_score_grads(Records const& records, DropoutScales scales,
                                        Scores const& p, Scores& dp) {
  scales.visit_deltas<decltype(size(dp))::value>(records, [&](int i, float delta) {
    float const left = (p(i) + fabsf(p(i))) * (0.5f * scales.left);  // FMNMX is slower
    dp(i) = left * dp(i) - fabsf(p(i)) * delta;
  });
}

// The same with a soft cap, of marked scores, which become marked P. Meanwhile dP has
// the marks.
template <class Records, class Scores>
CUTLASS_DEVICE void dropped_capped_score_grads(Params const& params, Records const& records,
                                               DropoutScales scales, Scores& scores, Scores& dp) {
  scales.visit_deltas<decltype(size(dp))::value>(records, [&](int i, float delta) {
    uint32_t const mark = __float_as_uint(scores(i)) & 1;
    float const left = mark != 0 ? 0.f : dp(i);
    float const grad = (left * scales.left - delta) * Score::cap_grad(scores(i));
    uint32_t marked = (__float_as_uint(grad) & ~1u) | mark;
    asm volatile("" : "+r"(marked));  // else the marks are kept in registers of their own
    dp(i) = __uint_as_float(marked);
  });
  probabilities<true>(params, records, scores);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(dp); ++i) {
    uint32_t const mark = __float_as_uint(dp(i)) << 31;
    dp(i) *= scores(i);
    scores(i) = __uint_as_float(__float_as_uint(scores(i)) | mark);
  }
}

// packed() of marked P: 0 for dropped weights.
template <class Element, class Fragment>
CUTLASS_DEVICE auto packed_left(Fragment const& p) {
  auto result = cute::make_tensor<uint32_t>(cute::Int<decltype(size(p))::value / 2>{});
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(result); ++i) {
    if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
      asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;"
          : "=r"(result(i))
          : "f"(p(2 * i + 1)), "f"(p(2 * i)));
    } else {
      asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(result(i)) : "f"(p(2 * i + 1)), "f"(p(2 * i)));
    }
  }
  return result;
}

}  // namespace jax_fa3::bwd
