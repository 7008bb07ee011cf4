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
  // its multiplier is the XOR of both.
  uint32_t quads[4], places[8];
  // A weight is kept if its 7 bits are at least a threshold; this one is added to them, in each
  // byte, so that bit 7 says so. It is that of the higher of two neighbouring thresholds, which a
  // row has in a block of keys if 15 of its bits and `choice` leave theirs unset.
  uint32_t threshold, choice;
  float scale;  // of the weights that are left

  CUTLASS_DEVICE uint2 of_head(int index) const {
    return __ldg(reinterpret_cast<uint2 const*>(words) + index);
  }
};

inline Dropout make_dropout(uint32_t const* words, int dropout) {
  constexpr int kOfBits = kDropoutWhole / 128;  // how finely two thresholds are mixed
  return {words,
          {0x243F6A88u, 0x13198A2Eu, 0xA4093822u, 0x299F31D0u},
          {0x85A308D3u, 0x03707345u, 0xEC4E6C89u, 0x082EFA99u, 0x38D01377u, 0xBE5466CFu,
           0x452821E7u, 0x34E90C6Du},
          (127u - dropout / kOfBits) * 0x01010101u,
          0x80008000u - dropout % kOfBits * (0x8000u / kOfBits) * 0x10001u,
          static_cast<float>(kDropoutWhole) / (kDropoutWhole - dropout)};
}

// Keys of one block for which rows have one state.
inline constexpr int kDropoutKeys = 64;
inline constexpr int kDropoutRounds = 5;

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
  uint32_t word;
  uint32_t threshold;  // what is added to the bits of a weight, in each byte

  CUTLASS_DEVICE static DropoutState of(Dropout const& dropout, uint2 head, int block,
                                        uint32_t pair) {
    uint32_t left = static_cast<uint32_t>(block);
    uint32_t right = pair;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kDropoutRounds; ++i) {
      auto const x = detail::product(left, detail::kPhilox);
      left = x.high ^ (i % 2 == 0 ? head.x : head.y) ^ right;
      right = x.low;
    }
    uint32_t const choice = (right & 0x7fff7fffu) + dropout.choice;
    uint32_t const lower = detail::signs<0xBB99>(choice, choice);
    return {left, dropout.threshold + (lower & 0x01010101u)};
  }
};

// The decisions about four weights, in bit 7 of each byte, set for a weight that is kept: of query
// row i those of keys j and j + 8, then of row i + 8.
CUTLASS_DEVICE uint32_t keeps(DropoutState state, uint2 head, uint32_t multiplier) {
  uint64_t const sum = uint64_t{head.y} << 32 | head.x;
  uint64_t const found = uint64_t{state.word} * multiplier + sum;
  uint32_t const bits = static_cast<uint32_t>(found >> 32) ^ static_cast<uint32_t>(found);
  return (bits & 0x7f7f7f7fu) + state.threshold;
}

// Of two evaluations: for a packed pair of weights a mask, of bytes kByte of both.
template <int kByte>
CUTLASS_DEVICE uint32_t pair_mask(uint32_t a, uint32_t b) {
  return detail::signs<0xCC88 + kByte * 0x1111>(a, b);
}
// Sets dropped weights of a forward's P, packed, to 0. `lane_multiplier`: of the thread's keys
// by its lane in its quad; `pair`: of its rows.
template <int kKeys, class Packed>
CUTLASS_DEVICE void drop_packed(Dropout const& dropout, uint2 head, uint32_t lane_multiplier,
                                int n_block, uint32_t pair, Packed& packed) {
  static_assert(kKeys % kDropoutKeys == 0);
  CUTLASS_PRAGMA_UNROLL
  for (int block = 0; block < kKeys / kDropoutKeys; ++block) {
    auto const state =
        DropoutState::of(dropout, head, n_block * (kKeys / kDropoutKeys) + block, pair);
    CUTLASS_PRAGMA_UNROLL
    for (int place = 0; place < 8; place += 2) {  // 16 keys
      uint32_t const even = keeps(state, head, lane_multiplier ^ dropout.places[place]);
      uint32_t const odd = keeps(state, head, lane_multiplier ^ dropout.places[place + 1]);
      int const i = block * (kDropoutKeys / 4) + place * 2;
      packed(i) &= pair_mask<0>(even, odd);
      packed(i + 1) &= pair_mask<2>(even, odd);
      packed(i + 2) &= pair_mask<1>(even, odd);
      packed(i + 3) &= pair_mask<3>(even, odd);
    }
  }
}

}  // namespace jax_fa3
