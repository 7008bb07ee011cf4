// Dropout in the backward, on S^T and dP^T: dV takes the weights that are left, and dS = P (dP -
// delta) has dP of those alone. That a weight is dropped is kept in its P, which is never negative,
// as the sign: so it needs no registers, and the words are found while exponentials are computed.
#pragma once

#include "bwd/scores.h"
#include "common/dropout.h"

namespace jax_fa3::bwd {

// What a consumer thread's two keys have of it.
struct KeyDropout {
  Dropout const& dropout;
  uint32_t multiplier;
  int block;

  CUTLASS_DEVICE KeyDropout(Dropout const& all, int key) : dropout(all) {
    asm volatile("" : "+r"(key));  // found again for every step: registers are few
    int const place = key % kDropoutKeys / 16 * 2 + key % 2;
    multiplier = all.quads[key / 2 % 4] ^ all.places[place];
    block = key / kDropoutKeys;
  }

  // Calls visit(i, word) for every element of S^T, bit 31 being set where its weight is kept.
  // Eight lanes have the same query rows: each finds the state of one pair in 64, for all.
  template <int kSize, class Visit>
  CUTLASS_DEVICE void visit(uint2 head, int first_row, Visit const& visit) const {
    int const lane = threadIdx.x % 32;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; i += 32) {  // 64 query rows
      int const row = first_row + i * 2 + lane / 8 * 16 + lane % 4 * 2 + lane / 4 % 2;
      auto const own = DropoutState::of(dropout, head, block, dropout_pair(row));
      CUTLASS_PRAGMA_UNROLL
      for (int pair = 0; pair < 8; ++pair) {
        int const source = pair * 4 + lane % 4;
        DropoutState const state{__shfl_sync(~0u, own.word, source),
                                 __shfl_sync(~0u, own.threshold, source)};
        uint32_t const found = keeps(state, head, multiplier);
        int const e = i + pair / 2 * 8 + pair % 2;
        visit(e, found << 24);
        visit(e + 2, found << 16);
        visit(e + 4, found << 8);
        visit(e + 6, found);
      }
    }
  }
};

// Marks dropped weights: by the sign of P, or with a soft cap, where P is found later, by the last
// bit of what is there.
template <class Scores>
CUTLASS_DEVICE void mark_dropped(KeyDropout const& keys, Params const& params, uint2 head,
                                 int first_row, Scores& p) {
  constexpr int kSize = decltype(size(p))::value;
  if (params.score.cap_scale == 0.f) {
    keys.visit<kSize>(head, first_row, [&](int i, uint32_t word) {
      p(i) = __uint_as_float(__float_as_uint(p(i)) | (~word & 0x80000000u));
    });
  } else {
    keys.visit<kSize>(head, first_row, [&](int i, uint32_t word) {
      p(i) = __uint_as_float((__float_as_uint(p(i)) & ~1u) | (~word >> 31));
    });
  }
}

// score_grads() of marked P; scale is ds_scale() times that of the weights that are left.
template <class Records, class Scores>
CUTLASS_DEVICE void dropped_score_grads(Records const& records, float scale, Scores const& p,
                                        Scores& dp) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(dp); i += 4) {
    float2 const delta = records.delta_of(i);
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < 4; ++e) {
      float const left = fmaxf(p(i + e), 0.f) * scale;
      dp(i + e) = left * dp(i + e) - fabsf(p(i + e)) * Records::of(delta, e);
    }
  }
}

// The same with a soft cap, of marked scores, which become marked P. Meanwhile dP has
// the marks.
template <class Records, class Scores>
CUTLASS_DEVICE void dropped_capped_score_grads(Params const& params, Records const& records,
                                               float scale, Scores& scores, Scores& dp) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(dp); i += 4) {
    float2 const delta = records.delta_of(i);
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < 4; ++e) {
      uint32_t const mark = __float_as_uint(scores(i + e)) & 1;
      float const left = mark != 0 ? 0.f : dp(i + e);
      float const grad = (left * scale - Records::of(delta, e)) * Score::cap_grad(scores(i + e));
      uint32_t marked = (__float_as_uint(grad) & ~1u) | mark;
      asm volatile("" : "+r"(marked));  // else the marks are kept in registers of their own
      dp(i + e) = __uint_as_float(marked);
    }
  }
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
