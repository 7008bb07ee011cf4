// Dropout on the attention weights: which of them are dropped, twin of jax_fa3/_dropout.py, which
// says what the words are made of.
//
// The four weights of query rows i and i + 8 and keys j and j + 8 have their words from one
// evaluation: a thread holds all four both in the forward's accumulators, whose rows are query
// rows, and in the backward's, whose rows are keys.
#pragma once

#include "common/fragment.h"
#include "plan.h"

namespace jax_fa3 {

struct Dropout {
  uint32_t const* words;  // [b, n, 2], of each head
  // What a pair of keys j and j + 8 has by bits 1 and 2 of j, and by its place, bits 0, 4 and 5:
  // its multiplier is the XOR of both. The thresholds are what keeps() adds to a pair of words.
  uint32_t quads[4], places[8], thresholds[8];
  float scale;  // of the weights that are left

  CUTLASS_DEVICE uint2 of_head(int index) const {
    return __ldg(reinterpret_cast<uint2 const*>(words) + index);
  }
};

inline Dropout make_dropout(uint32_t const* words, int dropout) {
  Dropout found{words,
                {0x243F6A88u, 0x13198A2Eu, 0xA4093822u, 0x299F31D0u},
                {0x85A308D3u, 0x03707345u, 0xEC4E6C89u, 0x082EFA99u, 0x38D01377u, 0xBE5466CFu,
                 0x452821E7u, 0x34E90C6Du},
                {},
                static_cast<float>(kDropoutWhole) / (kDropoutWhole - dropout)};
  for (int place = 0; place < 8; ++place) {
    found.thresholds[place] = 0x80008000u - ((dropout + place) >> 3) * 0x10001u;
  }
  return found;
}

// Keys of one block for which rows have one state.
inline constexpr int kDropoutKeys = 64;

namespace detail {

inline constexpr uint32_t kPhilox = 0xD256D193u;

struct Product {
  uint32_t high, low;
};
CUTLASS_DEVICE Product product(uint32_t x, uint32_t y) {
  uint64_t const xy = uint64_t{x} * y;
  return {static_cast<uint32_t>(xy >> 32), static_cast<uint32_t>(xy)};
}

// The pair of bytes of `a` and that of `b` whose sign bits the selector names, each sign bit
// throughout its half.
template <uint32_t kSelector>
CUTLASS_DEVICE uint32_t signs(uint32_t a, uint32_t b) {
  uint32_t found;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "n"(kSelector));
  return found;
}

}  // namespace detail

// The pair of query rows i and i + 8, i being `row` or that - 8.
CUTLASS_DEVICE uint32_t dropout_pair(int row) {
  return static_cast<uint32_t>(row) / 16 * 8 + row % 8;
}

// Of a block of keys and a pair of query rows.
struct DropoutState {
  uint32_t left, right;

  CUTLASS_DEVICE static DropoutState of(uint2 head, int block, uint32_t pair) {
    DropoutState state{static_cast<uint32_t>(block), pair};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 7; ++i) {
      auto const x = detail::product(state.left, detail::kPhilox);
      state = {x.high ^ (i % 2 == 0 ? head.x : head.y) ^ state.right, x.low};
    }
    return state;
  }
};

// The decisions about four weights: of query rows i (x) and i + 8 (y), each of key j in bit 15 and
// of j + 8 in bit 31, which is set for a weight that is kept.
CUTLASS_DEVICE uint2 keeps(DropoutState state, uint32_t multiplier, uint32_t threshold) {
  auto const first = detail::product(state.left, multiplier);
  auto const second = detail::product(first.high ^ state.right, detail::kPhilox);
  return {((second.high ^ first.low) & 0x7fff7fffu) + threshold,
          ((second.low ^ first.high) & 0x7fff7fffu) + threshold};
}

// Of two evaluations: for a packed pair of weights a mask, of key j's bits or of j + 8's.
template <bool kSecond>
CUTLASS_DEVICE uint32_t pair_mask(uint32_t a, uint32_t b) {
  return detail::signs<kSecond ? 0xFFBB : 0xDD99>(a, b);
}
// Of one: all 32 bits.
template <bool kSecond>
CUTLASS_DEVICE uint32_t whole_mask(uint32_t a) {
  return detail::signs<kSecond ? 0xBBBB : 0x9999>(a, a);
}

// Sets dropped weights of a forward's P, packed, to 0. `lane_multiplier`: of the thread's keys
// by its lane in its quad; `pair`: of its rows.
template <int kKeys, class Packed>
CUTLASS_DEVICE void drop_packed(Dropout const& dropout, uint2 head, uint32_t lane_multiplier,
                                int n_block, uint32_t pair, Packed& packed) {
  static_assert(kKeys % kDropoutKeys == 0);
  CUTLASS_PRAGMA_UNROLL
  for (int block = 0; block < kKeys / kDropoutKeys; ++block) {
    auto const state = DropoutState::of(head, n_block * (kKeys / kDropoutKeys) + block, pair);
    CUTLASS_PRAGMA_UNROLL
    for (int place = 0; place < 8; place += 2) {  // 16 keys
      uint2 const even =
          keeps(state, lane_multiplier ^ dropout.places[place], dropout.thresholds[place]);
      uint2 const odd =
          keeps(state, lane_multiplier ^ dropout.places[place + 1], dropout.thresholds[place + 1]);
      int const i = block * (kDropoutKeys / 4) + place * 2;
      packed(i) &= pair_mask<false>(even.x, odd.x);
      packed(i + 1) &= pair_mask<false>(even.y, odd.y);
      packed(i + 2) &= pair_mask<true>(even.x, odd.x);
      packed(i + 3) &= pair_mask<true>(even.y, odd.y);
    }
  }
}

}  // namespace jax_fa3
