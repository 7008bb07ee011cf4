// Shape of the machine code of the main backward kernel: tile, warpgroups, shared memory.
#pragma once

#include <cute/tensor.hpp>

#include "bwd/barriers.h"
#include "bwd/dropout.h"
#include "bwd/params.h"
#include "common/barriers.h"
#include "common/layouts.h"
#include "common/wgmma.h"
#include "plan.h"

namespace jax_fa3::bwd {

using namespace cute;

// One step of a tile of keys (params.h): a block of query rows of one head, against its keys.
struct Step {
  int m_block;  // -1: the tile has no step at all
  int head;
  bool masked;
  bool last;  // dK and dV leave the accumulators after it, as partial sums or whole (partial.h)
  bool ends;  // it is the tile's last
};

template <class Element_, int kHeadDim_, int kHeadDimV_, bool kHasBias_ = false,
          bool kHasDropout_ = false,
          bool kOneTile_ = kHasBias_ || (kHasDropout_ && (kHeadDim_ > 64))>
struct Traits {
  static constexpr bool kHasBias = kHasBias_;
  static constexpr bool kHasBits = false;
  static constexpr bool kHasAlibi = false;
  static constexpr bool kHasRelative = false;
  static constexpr bool kHasDropout = kHasDropout_;
  static_assert(!kHasBias || !kHasDropout);
  using Params = std::conditional_t<kHasBias, BiasParams,
                                    std::conditional_t<kHasDropout, DropoutParams, bwd::Params>>;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr BwdTile kTile = bwd_tile(kHeadDim, kHasBias);
  static constexpr int kBlockM = kTile.block_m;  // query rows of a step
  static constexpr int kBlockN = kTile.block_n;  // keys of the CTA
  static constexpr bool kFused = kTile.fused;
  static constexpr bool kPaired = false;
  static constexpr bool kNarrow = kHeadDim <= 64;  // S and dQ fit into the registers together
  // A CTA takes one tile after the other: the next one's K, V, Q and dO are loaded while this one's
  // gradients are stored.
  static constexpr bool kPersistent = (kNarrow || kHeadDim == 128) && !kOneTile_;
  static constexpr int kStages = 2;  // of Q and of dO
  static constexpr int kStagesdO = kStages;
  static constexpr int kWritersdQ = kFused ? kStages : 0;  // warps that add dQ: one for each stage

  // One producer warpgroup (a warp loads, two write dQ), then two consumers. Fused: each owns
  // 64 keys. Wide: both own the same 64 keys, one computes dV, the other dK.
  static constexpr int kConsumerThreads = kBwdConsumerThreads;
  static constexpr int kThreads = 128 + kConsumerThreads;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kWarpgroupsN = kFused ? 2 : 1;
  static_assert(kBlockN == 64 * kWarpgroupsN);

  // A warpgroup computes 64 rows of dQ. Where the tile has just 64, each computes half the columns.
  // Half of 80 or 96 columns is no whole slab. There K lies in four slabs of 32 columns: the first
  // warpgroup takes slab 0 and the first half of what is beyond 64, the second slab 1 and the other
  // half, with which the fourth slab begins.
  static constexpr int kWarpgroupsM = kBlockM / 64;
  static constexpr int kColumnsdQ = kHeadDim * kWarpgroupsM / 2;  // of one warpgroup
  static constexpr bool kFourSlabs = kFused && kWarpgroupsM == 1 && kColumnsdQ % 32 != 0;
  static constexpr int kFourthSlab = 64 + (kHeadDim - 64) / 2;  // where it begins
  static constexpr int kSlabK = kFourSlabs ? 32 : slab(kHeadDim);
  static constexpr int kColumnsK = kFourSlabs ? 4 * 32 : kHeadDim;

  using LayoutK = LayoutRows<kBlockN, kColumnsK, 1, kSlabK>;
  using LayoutKtInOrder = LayoutColumns<kBlockN, kColumnsK, 1, kSlabK>;
  using ByWarpgroup = Layout<Shape<_32, _2, _2>, Stride<_1, _64, _32>>;
  using LayoutKt =
      std::conditional_t<kFourSlabs,
                         decltype(composition(LayoutKtInOrder{},
                                              make_tile(ByWarpgroup{}, Int<kBlockN>{}, _1{}))),
                         LayoutKtInOrder>;
  using LayoutV = LayoutRows<kBlockN, kHeadDimV, 1>;
  using LayoutQ = LayoutRows<kBlockM, kHeadDim, kStages>;
  using LayoutQt = LayoutColumns<kBlockM, kHeadDim, kStages>;
  using LayoutdO = LayoutRows<kBlockM, kHeadDimV, kStages>;
  using LayoutdOt = LayoutColumns<kBlockM, kHeadDimV, kStages>;
  // dS as the A operand [m, n] of dQ, from dS^T [n, m] in slabs of 64 query rows.
  using LayoutdS = LayoutColumns<kBlockN, kBlockM, 2>;

  // S^T = K Q^T and dP^T = V dO^T have both operands in shared memory. dV += P^T dO and dK += dS^T
  // Q have their A operands P^T and dS^T in registers: a thread computes its elements from those of
  // S^T and dP^T that it holds, for both layouts are the same. dQ = dS K is from shared memory.
  using TileN = Layout<Shape<Int<kWarpgroupsN>, _1, _1>>;
  template <int kDim>
  using MmaScores = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kBlockM>, Int<kDim>>>(),
      TileN{}));
  template <int kDim>
  static constexpr auto grad_operation() {
    if constexpr (kDim == 80) {
      return Wgmma<Element, kDim, Operands::kRegisters>{};
    } else {
      return GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kDim>, Int<kBlockM>>,
                                  GMMA::Major::K, GMMA::Major::MN>();
    }
  }
  template <int kDim>
  using MmaGrad = decltype(make_tiled_mma(grad_operation<kDim>(), TileN{}));
  template <int kColumns>
  static constexpr auto dq_operation() {
    if constexpr (kColumns == 40 || kColumns == 48) {
      return Wgmma<Element, kColumns, Operands::kRows>{};
    } else {
      return GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kColumns>, Int<kBlockN>>,
                                  GMMA::Major::MN, GMMA::Major::MN>();
    }
  }
  using TiledQ = Layout<Shape<Int<kWarpgroupsM>, Int<2 / kWarpgroupsM>, _1>>;
  using MmadQ = decltype(make_tiled_mma(dq_operation<kFused ? kColumnsdQ : 64>(), TiledQ{}));
  // Over all columns in memory: makes the descriptors, which do not depend on how many are used.
  template <int kDim>
  using MmaGradInSlabs = MmaGrad<in_slabs(kDim)>;
  using MmadQInSlabs = decltype(make_tiled_mma(
      dq_operation<kFused ? kColumnsK * kWarpgroupsM / 2 : 64>(), TiledQ{}));
  static_assert(!kFused || tile_size<1>(MmadQ{}) == kHeadDim, "one wgmma must span the tile");
  static_assert(tile_size<1>(MmaScores<kHeadDim>{}) == kBlockM &&
                tile_size<1>(MmaGrad<kHeadDim>{}) == kHeadDim &&
                tile_size<1>(MmaGrad<kHeadDimV>{}) == kHeadDimV);

  static constexpr int kSizeQ = kBlockM * in_slabs(kHeadDim);  // of one stage
  static constexpr int kSizedO = kBlockM * in_slabs(kHeadDimV);
  static constexpr int kSizeK = kBlockN * kColumnsK;
  static constexpr int kSizeV = kBlockN * in_slabs(kHeadDimV);
  static constexpr int kSizedQ = kBlockM * kHeadDim;  // in fp32
  static constexpr int kSizedS = kBlockM * kBlockN;   // of one buffer

  // The bias: each warpgroup that computes S has a ring of slabs, behind `exchange`.
  static constexpr int kBiasStages = kHasBias ? 2 : 1;
  static constexpr int kSizeBias = kHasBias ? kWarpgroupsN * kBiasStages * kBiasSlab : 0;

  static constexpr int kGradRows = 64;  // that a warpgroup stores

  // With dropout: a step's states, there, too.
  using States = DropoutStates<kBlockM>;
  static constexpr int kSizeStates = kHasDropout ? kStages * sizeof(States) / 2 : 0;

  // Where kPersistent: a gradient of a warpgroup, on its way out.
  static constexpr int kSizeGrads = kPersistent ? 64 * in_slabs(kHeadDim) : 0;

  struct SharedStorage {
    alignas(1024) uint16_t key[kSizeK];
    alignas(1024) uint16_t value[kSizeV];
    alignas(1024) uint16_t query[kStages * kSizeQ];
    alignas(1024) uint16_t dout[kStages * kSizedO];
    // Fused: dS for dQ. Wide: P, from one warpgroup to the other. Two buffers.
    alignas(1024) uint16_t exchange[2 * kSizedS + kSizeBias + kSizeStates];
    alignas(1024) float dquery[kFused ? kSizedQ : 1];
    alignas(128) float stats[kStages * row_stats_of_block(kBlockM)];
    alignas(128) int2 intervals[kStages * kBlockM];
    Step steps[kStages];
    KeyTile tiles[kStages];  // of these steps, where kPersistent
    FullBarrier key_full;
    FullBarrier value_full;
    EmptyBarrier keys_empty;  // and values: they have been read for the last time
    FullBarrier staged;       // a tile with rows to be zeroed has landed
    Pipeline<kStages> query_pipeline;
    Pipeline<kStages> dout_pipeline;
    BiasRing<kBiasStages> bias_rings[kWarpgroupsN];
    alignas(kPersistent ? 1024 : 2) uint16_t grads[kPersistent ? 2 * kSizeGrads : 1];

    CUTLASS_DEVICE uint16_t* bias(int warpgroup) {
      return exchange + 2 * kSizedS + warpgroup * kBiasStages * kBiasSlab;
    }
    CUTLASS_DEVICE States& dropout_states(int stage) {
      return reinterpret_cast<States*>(exchange + 2 * kSizedS)[stage];
    }
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// With a dense mask.
template <class Element, int kHeadDim, int kHeadDimV>
struct BitsTraits : Traits<Element, kHeadDim, kHeadDimV> {
  static constexpr bool kHasBits = true;
  using Params = BitsParams;
};

// With slopes (common/alibi.h). Their operands and memory for gradients of a tile's own do not fit
// together at head dim 128, so that a CTA takes one tile.
template <class Element, int kHeadDim, int kHeadDimV>
struct AlibiTraits : Traits<Element, kHeadDim, kHeadDimV, false, false, (kHeadDim > 64)> {
  using Base = Traits<Element, kHeadDim, kHeadDimV, false, false, (kHeadDim > 64)>;
  static constexpr bool kHasAlibi = true;
  using Params = AlibiParams;
  using MmaTerm =
      decltype(make_tiled_mma(GMMA::ss_op_selector<cutlass::bfloat16_t, cutlass::bfloat16_t, float,
                                                   Shape<_64, Int<Base::kBlockM>, _16>>(),
                              typename Base::TileN{}));
  using LayoutTermKeys = LayoutTerm<Base::kBlockN, 1>;
  using LayoutTermQueries = LayoutTerm<Base::kBlockM, Base::kStages>;
  struct SharedStorage : Base::SharedStorage {
    alignas(128) uint16_t term_keys[term_size(Base::kBlockN, 1)];  // the same for all steps
    alignas(128) uint16_t term_queries[term_size(Base::kBlockM, Base::kStages)];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// With a bias by distance (common/relative_bias.h). Of tiles one after the other head dim 128 would
// be slower by 4 %, for it reads two spilled numbers in each step.
template <class Element, int kHeadDim, int kHeadDimV>
struct RelativeTraits : Traits<Element, kHeadDim, kHeadDimV, false, false, (kHeadDim > 64)> {
  static constexpr bool kHasRelative = true;
  using Params = RelativeParams;
};

// Where the step at `state` has its dO. If there is one stage, its phase changes with each step.
template <class Traits>
CUTLASS_DEVICE PipelineState<Traits::kStagesdO> dout_state(
    PipelineState<Traits::kStages> const& state) {
  if constexpr (Traits::kStagesdO == Traits::kStages) {
    return state;
  } else {
    static_assert(Traits::kStages == 2 && Traits::kStagesdO == 1);
    return {0, static_cast<uint32_t>(state.stage)};
  }
}

// Whether K and V of a tile are loaded before its first Q and dO, or behind those, which have room
// earlier where a tile comes before (at head dim 128 the loading warp has no registers for that).
template <class Traits>
inline constexpr bool kKeysFirst = !(Traits::kPersistent && (Traits::kNarrow || Traits::kPaired));

// The loading warp adds something to Q of a step, with an arrival of its own: ALiBi's operand, or
// the states of dropout.
template <class Traits>
inline constexpr bool kAddsToQueries = Traits::kHasAlibi || Traits::kHasDropout;

}  // namespace jax_fa3::bwd
