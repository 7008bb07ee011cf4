// What becomes of a tile's parts: how they are joined, where the rows go, and the sink that they
// take in at the very end.
#pragma once

#include <cutlass/cutlass.h>

#include "decode/params.h"

namespace jax_fa3::decode {

// The rows of a tile as rows of query and out.
struct OutRow {
  int first_row;  // of the sequence
  int count;
  int head;  // of keys
  int tile;

  // Of a tile's row: (row of query, query head) as one number; -1 if there is no such row.
  CUTLASS_DEVICE int64_t index(int tile_row, int block_m, Divider const& group,
                               int num_heads_q) const {
    int const row = tile * block_m + tile_row;
    int const query_row = group(row);
    if (query_row >= count) return -1;
    return int64_t{first_row + query_row} * num_heads_q + head * group.divisor + group.rest(row);
  }
};

// Two parts of one row become one. Rounded step by step, so that the same two always give the same,
// whoever joins them; and a part without keys changes nothing at all.
struct Joined {
  float lse;
  float before;  // what share of the weights each has
  float now;

  CUTLASS_DEVICE Joined(float lse_before, float lse_now) : lse(-INFINITY), before(1.f), now(0.f) {
    if (lse_before == -INFINITY && lse_now == -INFINITY) return;
    constexpr float kLn2 = 0.693147181f;
    float const top = fmaxf(lse_before, lse_now);  // a NaN comes back by its difference
    float const of_before = exp2f(__fmul_rn(__fsub_rn(lse_before, top), kLog2E));
    float const of_now = exp2f(__fmul_rn(__fsub_rn(lse_now, top), kLog2E));
    float const sum = __fadd_rn(of_before, of_now);
    float const inverse = __frcp_rn(sum);
    lse = __fadd_rn(top, __fmul_rn(__log2f(sum), kLn2));
    before = __fmul_rn(of_before, inverse);
    now = __fmul_rn(of_now, inverse);
  }
  CUTLASS_DEVICE float operator()(float out_before, float out_now) const {
    return __fmaf_rn(before, out_before, __fmul_rn(now, out_now));
  }
};

// A sink is one more key of value 0 for rows that see a key. Adds it to the log-sum-exp, and
// returns what share of the weights the keys have.
CUTLASS_DEVICE float add_sink(float sink, float* lse) {
  if (sink == -INFINITY || *lse == -INFINITY) return 1.f;
  float const top = fmaxf(*lse, sink);
  float const weight = exp2f((*lse - top) * kLog2E);
  float const sum = weight + exp2f((sink - top) * kLog2E);
  *lse = top + logf(sum);
  return weight / sum;
}

// index: (row of query, query head) as one number.
CUTLASS_DEVICE float add_sink(Params const& params, int64_t index, float* lse) {
  if (params.sinks == nullptr) return 1.f;
  return add_sink(params.sinks[static_cast<int>(index) % params.num_heads_q], lse);
}

// What words of memory hold beside a part's numbers when these are there: a signalling NaN, which
// no computation makes. The two are one element of 64 bits of what is written and read, so they
// come together.
inline constexpr uint32_t kIsThere = 0x7fb5'ff9b;

CUTLASS_DEVICE uint64_t flagged(float x) { return uint64_t{kIsThere} << 32 | __float_as_uint(x); }
CUTLASS_DEVICE void store_relaxed(ulonglong2* to, uint64_t x, uint64_t y) {
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
               "l"(x), "l"(y)
               : "memory");
}
CUTLASS_DEVICE void store_relaxed(uint64_t* to, uint64_t x) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "l"(x)
               : "memory");
}
CUTLASS_DEVICE ulonglong2 load_relaxed(ulonglong2 const* from) {
  uint64_t x, y;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(x), "=l"(y)
               : "l"(__cvta_generic_to_global(from)));
  return {x, y};
}
CUTLASS_DEVICE uint64_t load_relaxed(uint64_t const* from) {
  uint64_t x;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];"
               : "=l"(x)
               : "l"(__cvta_generic_to_global(from)));
  return x;
}

// Of a CTA's part that is flagged so, which takes the place of two: of a row, two columns, and the
// log-sum-exp.
struct FlaggedPart {
  ulonglong2* out;
  uint64_t* lse;

  CUTLASS_DEVICE FlaggedPart(Params const& params, int cta, int row) {
    int64_t const place = int64_t{cta} * params.slots * params.slot_rows;
    out = reinterpret_cast<ulonglong2*>(params.partial_out + (place + 2 * row) * params.head_dim_v);
    lse = reinterpret_cast<uint64_t*>(params.partial_lse + place + 2 * row);
  }
  CUTLASS_DEVICE void store_out(int column, float x, float y) const {
    store_relaxed(out + column / 2, flagged(x), flagged(y));
  }
  CUTLASS_DEVICE void store_lse(float x) const { store_relaxed(lse, flagged(x)); }
};

}  // namespace jax_fa3::decode
