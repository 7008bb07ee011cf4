// Shape of the machine code of the main backward kernel of head dims 129 to 192 (paired.h).
#pragma once

#include <cute/tensor.hpp>

#include "bwd/barriers.h"
#include "bwd/params.h"
#include "bwd/traits.h"
#include "common/barriers.h"
#include "common/layouts.h"
#include "plan.h"

namespace jax_fa3::bwd {

using namespace cute;

template <class Element_, int kHeadDim_, int kHeadDimV_>
struct PairedTraits {
  static constexpr bool kHasBias = false;
  static constexpr bool kHasBits = false;
  static constexpr bool kHasAlibi = false;
  static constexpr bool kHasRelative = false;
  static constexpr bool kHasDropout = false;
  using Params = bwd::Params;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr BwdTile kTile = bwd_tile(kHeadDim);
  static constexpr int kBlockM = kTile.block_m;  // query rows of a step
  static constexpr int kBlockN = kTile.block_n;  // keys of the CTA
  static constexpr bool kFused = true;
  static constexpr bool kPaired = true;
  static constexpr bool kNarrow = false;
  static constexpr bool kPersistent = true;
  static constexpr int kStages = 2;                          // of Q
  static constexpr int kStagesdO = kHeadDimV > 128 ? 1 : 2;  // there is no room for more
  static constexpr int kWritersdQ = kStages;                 // warps that add dQ
  static constexpr int kConsumerThreads = kBwdConsumerThreads;
  static constexpr int kThreads = 128 + kConsumerThreads;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kWarpgroupsM = 1;  // dQ: each warpgroup computes half of the columns
  static constexpr int kColumnsdQ = kHeadDim / 2;
  // Whether there are registers for dV, S and dQ at the same time.
  static constexpr bool kEarlyS = kHeadDimV <= 128;
  static constexpr bool kFourSlabs = false;
  static constexpr int kFourthSlab = 0;
  // Half of the columns are whole slabs of 32, not of 64.
  static constexpr int kSlabK = 32;
  static constexpr int kGradRows = kBlockN;  // that a warpgroup stores
  static_assert(kBlockM == 64 && kColumnsdQ % kSlabK == 0);

  using LayoutK = LayoutRows<kBlockN, kHeadDim, 1, kSlabK>;
  using LayoutKt = LayoutColumns<kBlockN, kHeadDim, 1, kSlabK>;
  using LayoutV = LayoutRows<kBlockN, kHeadDimV, 1>;
  using LayoutQ = LayoutRows<kBlockM, kHeadDim, kStages>;
  using LayoutQt = LayoutColumns<kBlockM, kHeadDim, kStages>;
  using LayoutdO = LayoutRows<kBlockM, kHeadDimV, kStagesdO>;
  using LayoutdOt = LayoutColumns<kBlockM, kHeadDimV, kStagesdO>;
  // P and dS, [m, n], and as the B operands [n, m] of dV^T and dK^T.
  using LayoutScores = LayoutRows<kBlockM, kBlockN, 1>;
  using LayoutScoresT = LayoutColumns<kBlockM, kBlockN, 1>;

  // S = Q K^T and dP = dO V^T, of one warpgroup each; dV^T = dO^T P and dK^T = Q^T dS likewise, all
  // with both operands in shared memory. dQ = dS K, of both.
  using One = Layout<Shape<_1, _1, _1>>;
  template <int kDim>
  using MmaScores = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kBlockN>, Int<kDim>>>(), One{}));
  using MmaGrad = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kBlockN>, Int<kBlockM>>,
                           GMMA::Major::MN, GMMA::Major::MN>(),
      One{}));
  using MmadQ = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kColumnsdQ>, Int<kBlockN>>,
                           GMMA::Major::K, GMMA::Major::MN>(),
      Layout<Shape<_1, _2, _1>>{}));
  static_assert(tile_size<1>(MmadQ{}) == kHeadDim && tile_size<1>(MmaGrad{}) == kBlockN &&
                tile_size<1>(MmaScores<kHeadDim>{}) == kBlockN);

  static constexpr int kSizeQ = kBlockM * kHeadDim;  // of one stage
  static constexpr int kSizedO = kBlockM * kHeadDimV;
  static constexpr int kSizeK = kBlockN * kHeadDim;
  static constexpr int kSizeV = kBlockN * kHeadDimV;
  static constexpr int kSizedQ = kBlockM * kHeadDim;  // in fp32
  static constexpr int kSizeScores = kBlockM * kBlockN;

  struct SharedStorage {
    alignas(1024) uint16_t key[kSizeK];
    alignas(1024) uint16_t value[kSizeV];
    alignas(1024) uint16_t query[kStages * kSizeQ];
    alignas(1024) uint16_t dout[kStagesdO * kSizedO];
    alignas(1024) uint16_t weights[kSizeScores];      // P
    alignas(1024) uint16_t score_grads[kSizeScores];  // dS
    alignas(1024) float dquery[kSizedQ];
    alignas(128) uint32_t weights_lost[kSizeScores / 4];  // of P (lost_bits.h)
    alignas(128) float stats[kStages * row_stats_of_block(kBlockM)];
    alignas(128) int2 intervals[kStages * kBlockM];
    FullBarrier key_full;
    FullBarrier value_full;
    FullBarrier staged;       // a tile with rows to be zeroed has landed
    EmptyBarrier keys_empty;  // and values: gradients have left their memory, too
    Pipeline<kStages> query_pipeline;
    Pipeline<kStagesdO> dout_pipeline;
    Step steps[kStages];
    KeyTile tiles[kStages];  // of these steps
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace jax_fa3::bwd
