// Shape of the machine code of one tangent kernel.
#pragma once

#include "fwd/traits.h"
#include "jvp/jvp.h"

namespace jax_fa3::jvp {

using namespace cute;

// `lse` and `lse_low` are read here, and sinks are in lse already.
struct Params : fwd::Params {
  CUtensorMap query_dot, key_dot, value_dot;  // as query, key and value
  Operand out_rows, out_dot;                  // [b, t, n, v]
  float* lse_dot;                             // [b, n, t]
  float score_dot_scale;                      // of the tangent of a score, in base e
};

template <class Element_, int kHeadDim_>
struct Traits {
  static constexpr bool kHasBits = false;
  using Params = jvp::Params;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr JvpTile kTile = jvp_tile(kHeadDim);
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kStages = kTile.stages;
  static constexpr int kWorkStages = 1;

  static constexpr int kConsumerWarpgroups = kBlockM / 64;
  // Turns cost 9 to 15 % at head dim 256, whose steps of 32 keys are short; below they gain a
  // little.
  static constexpr bool kPingPong = kHeadDim <= 128;
  static constexpr bool kBlocksByWarpgroup = false;
  static constexpr bool kSharesKeys = false;
  static constexpr int kCtasPerSm = 1;
  static constexpr int kThreads = 128 + kConsumerWarpgroups * 128;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static_assert(kConsumerWarpgroups == 2);

  static constexpr int kSlab = slab(kHeadDim);
  using Warpgroups = Layout<Shape<Int<kConsumerWarpgroups>, _1, _1>>;
  template <int kKeys>
  using MmaScores = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kKeys>, Int<kHeadDim>>>(),
      Warpgroups{}));
  using MmaPV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kHeadDim>, Int<2 * kBlockN>>,
                           GMMA::Major::K, GMMA::Major::MN>(),
      Warpgroups{}));
  static_assert(tile_size<1>(MmaScores<2 * kBlockN>{}) == 2 * kBlockN &&
                tile_size<1>(MmaPV{}) == kHeadDim);

  // One ring of pairs, which are one operand of twice as many keys: K above its tangent, or the
  // tangent of V above V.
  using LayoutQ = LayoutRows<kBlockM, kHeadDim, 1>;
  using LayoutKeyPair = LayoutRows<2 * kBlockN, kHeadDim, kStages>;
  using LayoutKey = decltype(composition(
      LayoutKeyPair{}, make_tile(Int<kBlockN>{}, Int<kHeadDim>{}, Int<kStages>{})));
  using LayoutValuePair = LayoutColumns<2 * kBlockN, kHeadDim, kStages>;
  static constexpr int kSizeQ = kBlockM * kHeadDim;
  static constexpr int kSizePair = 2 * kBlockN * kHeadDim;

  // A consumer's positions in the pipelines, kept from tile to tile.
  struct ConsumerState {
    PipelineState<kStages> pair;
    PipelineState<kWorkStages> work;
    uint32_t query_phase = 0;
  };

  struct SharedStorage {
    alignas(1024) uint16_t query[kSizeQ];
    alignas(1024) uint16_t query_dot[kSizeQ];
    alignas(1024) uint16_t pairs[kStages * kSizePair];
    // Of an operand and its tangent.
    FullBarrier query_full[kConsumerWarpgroups];
    EmptyBarrier query_empty[kConsumerWarpgroups];
    FullBarrier value_staged;  // V has landed, its rows past the length are still to be zeroed
    Pipeline<kStages> pair_pipeline;
    Pipeline<kWorkStages> work_pipeline;
    WorkTile work[kWorkStages];

    CUTLASS_DEVICE void init_barriers() {
      constexpr int kConsumerWarps = kConsumerWarpgroups * 4;
      init_query_barriers(query_full, query_empty);
      value_staged.init(1);
      pair_pipeline.init(kConsumerWarps);
      work_pipeline.init(kConsumerWarps + 1);  // and the loading warp
      cutlass::arch::fence_barrier_init();
    }
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace jax_fa3::jvp
