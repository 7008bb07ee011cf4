// From S to P and from dP to dS, and their ways: from the registers to the operands of the
// gradient, and between the two roles.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "bwd/range.h"
#include "bwd/scores.h"
#include "common/fragment.h"
#include "common/tma.h"
#include "wide_bwd/gemms.h"

namespace jax_fa3::wide_bwd {

inline constexpr int kUnitBytes = 64 * 64 * 2;

// A warpgroup's 64 x 64 numbers, packed in pairs, to and from a unit of shared memory; all, or one
// of equal parts.
template <int kPart = 0, int kColumns = 64, class Packed>
CUTLASS_DEVICE void store_unit(Packed const& packed, uint16_t* unit) {
  stage_packed<64, kColumns, 64>(packed, unit, threadIdx.x % 128 / 32 * 16, kPart * kColumns);
}
template <int kPart, class Element, class Part>
CUTLASS_DEVICE void store_part(Part const& part, uint16_t* unit) {
  constexpr int kSize = decltype(size(part))::value;
  store_unit<kPart, kSize * 2>(
      [&](int i) JAX_FA3_INLINE { return pack<Element>(part(2 * i), part(2 * i + 1)); }, unit);
}
template <class Packed>
CUTLASS_DEVICE void load_unit(uint16_t const* unit, Packed const& packed) {
  int const lane = threadIdx.x % 32;
  int const row = threadIdx.x % 128 / 32 * 16 + lane % 16;
  CUTLASS_PRAGMA_UNROLL
  for (int vector = 0; vector < 8; vector += 2) {
    int const swizzled = (vector + lane / 16) ^ row % 8;
    auto const* const source =
        reinterpret_cast<cute::uint128_t const*>(unit + row * 64 + swizzled * 8);
    int const i = vector * 2;
    cute::SM75_U32x4_LDSM_N::copy(*source, packed(i), packed(i + 1), packed(i + 2), packed(i + 3));
  }
}

// What a warpgroup's peer, the same of the CTA with the other role, sends.
template <class Traits>
struct Mailbox {
  typename Traits::SharedStorage& storage;
  int warpgroup;
  int self;
  int peer;
  uint32_t phase = 0;

  // Once before each that is received; without a branch, for wgmmas may be in flight.
  CUTLASS_DEVICE void expect() {
    storage.received[warpgroup].arrive_and_expect_tx(kUnitBytes, self, threadIdx.x % 128 == 0);
  }
  CUTLASS_DEVICE void wait() {
    storage.received[warpgroup].wait(phase);
    phase ^= 1;
  }
  // By the whole warpgroup, when it has written `from`.
  CUTLASS_DEVICE void send(uint16_t* to, uint16_t const* from) {
    if (threadIdx.x % 128 == 0) {
      wide_bwd::send(peer, to, storage.received[warpgroup], from, kUnitBytes);
    }
    __syncwarp();
  }
};

// i-th of the parts of a fragment; of packed ones, too.
template <int kPart, int kSize, class Fragment>
CUTLASS_DEVICE auto part_of(Fragment& fragment) {
  return make_tensor(&fragment(kPart * kSize), Layout<Int<kSize>>{});
}

// Of a step's query rows, 64 for each warpgroup, the records in shared memory.
template <class Traits>
struct QueryRecords {
  static constexpr int kPieces = Traits::kPiecesOfGrad;
  Params const& params;
  typename Traits::SharedStorage& storage;
  int warpgroup;
  int key;  // the thread's first
  PipelineState<Traits::kRecords> state;
  bwd::Step step;

  CUTLASS_DEVICE void read() {
    storage.records.full[state.stage].wait(state.phase);
    step = storage.steps[state.stage];
  }
  // Whether there is one more step, which is read then.
  CUTLASS_DEVICE bool next() {
    if (step.last) return false;
    read();
    return true;
  }
  CUTLASS_DEVICE void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) storage.records.empty[state.stage].arrive();
    state.advance();
  }
  template <int kPart>
  CUTLASS_DEVICE bwd::RowRecords<Traits::kBlockM> records() const {
    int const column = warpgroup * 64 + kPart * 8;
    return {storage.stats + state.stage * bwd::RowStats<Traits::kBlockM>::kSize + column,
            storage.intervals + state.stage * Traits::kBlockM + column, key};
  }
};

// dK and dV, the first role: P^T, for dV and for the peer. With a soft cap that gets P times its
// derivative.
template <class Traits, bool kIsCapped>
struct ProbabilitiesOfKeys : QueryRecords<Traits> {
  using Element = typename Traits::Element;
  Mailbox<Traits> mailbox;
  uint32_t send_phase = 1;
  uint16_t* weights = nullptr;
  uint16_t* exchange = nullptr;

  CUTLASS_DEVICE void prepare(int buffer) {
    auto& storage = this->storage;
    weights = storage.weights + (buffer * 2 + this->warpgroup) * Traits::kUnit;
    exchange = storage.exchange + this->warpgroup * Traits::kUnit;
    if constexpr (kIsCapped) wait_until_sent();
  }
  CUTLASS_DEVICE void take() {}
  // What was sent before has left, and has been read.
  CUTLASS_DEVICE void wait_until_sent() {
    this->storage.may_send[this->warpgroup].wait(send_phase);
    send_phase ^= 1;
  }
  template <int kPart, class Scores>
  CUTLASS_DEVICE void part(Scores& scores) {
    constexpr int kSize = Traits::kScoresOfPiece;
    Tensor part = part_of<kPart, kSize>(scores);
    float factor[kSize];
    if constexpr (kIsCapped) {
      this->params.score.cap_all(part);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) factor[i] = Score::cap_grad(part(i));
    }
    bwd::probabilities<true>(this->params, this->template records<kPart>(), part);
    store_part<kPart, Element>(part, weights);
    if constexpr (kIsCapped) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) part(i) *= factor[i];
      store_part<kPart, Element>(part, exchange);
    }
  }
  template <class Gemms>
  CUTLASS_DEVICE void hand_over(Gemms& gemms) {
    if constexpr (!kIsCapped) wait_until_sent();
    cutlass::arch::fence_view_async_shared();
    this->release();
    named_sync(NamedBarrier::kWeights, 0, 256);
    mailbox.send(exchange, kIsCapped ? exchange : weights);
    gemms.buffer ^= 1;
  }
};

// The second role: dS^T, for dK.
template <class Traits>
struct ScoreGradsOfKeys : QueryRecords<Traits> {
  using Element = typename Traits::Element;
  Mailbox<Traits> mailbox;
  float scale;
  uint16_t* weights = nullptr;
  uint32_t p[16];  // packed in pairs

  CUTLASS_DEVICE void prepare(int buffer) {
    auto& storage = this->storage;
    weights = storage.weights + (buffer * 2 + this->warpgroup) * Traits::kUnit;
    mailbox.wait();
    load_unit(storage.exchange + this->warpgroup * Traits::kUnit,
              [&](int i) JAX_FA3_INLINE -> uint32_t& { return p[i]; });
    mailbox.expect();
    __syncwarp();
    int const lane = threadIdx.x % 32;
    storage.may_send[this->warpgroup].arrive(mailbox.peer, lane == 0);
  }
  CUTLASS_DEVICE void take() {}
  template <int kPart, class Scores>
  CUTLASS_DEVICE void part(Scores& scores) {
    constexpr int kSize = Traits::kScoresOfPiece;
    Tensor ds = part_of<kPart, kSize>(scores);
    float of_part[kSize];
    Tensor p_of_part = make_tensor(&of_part[0], Layout<Int<kSize>>{});
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; ++i) {
      of_part[i] = unpack<Element>(p[(kPart * kSize + i) / 2], i % 2);
    }
    bwd::score_grads(this->template records<kPart>(), scale, p_of_part, ds);
    store_part<kPart, Element>(ds, weights);
  }
  template <class Gemms>
  CUTLASS_DEVICE void hand_over(Gemms& gemms) {
    cutlass::arch::fence_view_async_shared();
    this->release();
    named_sync(NamedBarrier::kWeights, 0, 256);
    gemms.buffer ^= 1;
  }
};

// Of dQ's rows, two of a thread.
struct OwnRows {
  Interval seen[kRowsPerThread];
  float lse[kRowsPerThread];
  float lse_low[kRowsPerThread];
  float delta[kRowsPerThread];

  template <class Traits>
  CUTLASS_DEVICE void read(Params const& params, TileCoord tile, int row) {
    using Stats = bwd::RowStats<Traits::kBlockM>;
    float const* const stats =
        params.row_stats + params.m_block_index(tile.batch, tile.head, tile.block) * Stats::kSize +
        row;
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      seen[r] = params.mask.row_interval(tile.batch, tile.block * Traits::kBlockM + row + r * 8);
      lse[r] = stats[Stats::kLse + r * 8];
      lse_low[r] = stats[Stats::kLseLow + r * 8];
      delta[r] = stats[Stats::kDelta + r * 8];
    }
  }
};

// dQ: the blocks of keys, the last first.
template <class Traits>
struct KeySteps {
  static constexpr int kPieces = Traits::kPiecesOfGrad;
  Params const& params;
  typename Traits::SharedStorage& storage;
  int warpgroup;
  int n_block;
  int first_block;
  OwnRows const& rows;
  Mailbox<Traits> mailbox;

  CUTLASS_DEVICE bool next() { return --n_block >= first_block; }
};

// The first role: P for the peer, which sends dS for it.
template <class Traits, bool kIsCapped>
struct ProbabilitiesOfQueries : KeySteps<Traits> {
  using Element = typename Traits::Element;

  CUTLASS_DEVICE void prepare(int) {}
  CUTLASS_DEVICE void take() { this->mailbox.wait(); }
  template <int kPart, class Scores>
  CUTLASS_DEVICE void part(Scores& scores) {
    OwnRows const& rows = this->rows;
    constexpr int kSize = Traits::kScoresOfPiece;
    Tensor part = part_of<kPart, kSize>(scores);
    int const key = this->n_block * Traits::kKeysOfStep + threadIdx.x % 4 * 2 + kPart * kSize * 2;
    if constexpr (kIsCapped) this->params.score.cap_all(part);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; ++i) {
      int const r = fragment_row(i);
      int const column = key + fragment_column(i);
      float const exponent = part(i) * this->params.softmax_scale_log2 - rows.lse[r];
      float weight = exp2f(exponent - rows.lse_low[r]);
      if constexpr (kIsCapped) weight *= Score::cap_grad(part(i));
      bool const visible = column >= rows.seen[r].begin && column < rows.seen[r].end;
      part(i) = visible ? weight : 0.f;
    }
    store_part<kPart, Element>(part, this->storage.exchange + this->warpgroup * Traits::kUnit);
  }
  template <class Gemms>
  CUTLASS_DEVICE void hand_over(Gemms&) {
    uint16_t* const exchange = this->storage.exchange + this->warpgroup * Traits::kUnit;
    cutlass::arch::fence_view_async_shared();
    this->mailbox.expect();  // dS of the step before was read: the next may come
    named_sync(NamedBarrier::kOfWarpgroup0, this->warpgroup, 128);
    this->mailbox.send(exchange, exchange);
  }
};

// The second role: dS, for both.
template <class Traits>
struct ScoreGradsOfQueries : KeySteps<Traits> {
  using Element = typename Traits::Element;
  float scale;
  uint32_t p[16];  // packed in pairs; then dS

  CUTLASS_DEVICE void prepare(int) {
    this->mailbox.wait();
    load_unit(this->storage.exchange + this->warpgroup * Traits::kUnit,
              [&](int i) JAX_FA3_INLINE -> uint32_t& { return p[i]; });
    this->mailbox.expect();
  }
  CUTLASS_DEVICE void take() {}
  template <int kPart, class Scores>
  CUTLASS_DEVICE void part(Scores& scores) {
    constexpr int kSize = Traits::kScoresOfPiece;
    Tensor ds = part_of<kPart, kSize>(scores);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; ++i) {
      float const weight = unpack<Element>(p[(kPart * kSize + i) / 2], i % 2);
      ds(i) = weight * (ds(i) * scale - this->rows.delta[fragment_row(i)]);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; i += 2) {
      p[(kPart * kSize + i) / 2] = pack<Element>(ds(i), ds(i + 1));
    }
  }
  template <class Gemms>
  CUTLASS_DEVICE void hand_over(Gemms&) {
    // dS of the step before was read, by the peer, too: P of this step has come.
    named_sync(NamedBarrier::kOfWarpgroup0, this->warpgroup, 128);
    uint16_t* const weights = this->storage.weights + this->warpgroup * Traits::kUnit;
    store_unit([&](int i) JAX_FA3_INLINE { return p[i]; }, weights);
    cutlass::arch::fence_view_async_shared();
    named_sync(NamedBarrier::kOfWarpgroup0, this->warpgroup, 128);
    this->mailbox.send(weights, weights);
  }
};

}  // namespace jax_fa3::wide_bwd
