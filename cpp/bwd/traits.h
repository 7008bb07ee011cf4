// Shape of the machine code of the main backward kernel: tile, warpgroups, shared memory.
#pragma once

#include <cute/tensor.hpp>

#include "bwd/barriers.h"
#include "common/barriers.h"
#include "common/layouts.h"
#include "plan.h"

namespace jax_fa3::bwd {

using namespace cute;

// What a CTA of the main kernel works on: a block of keys of one KV head, and of the steps that its
// query rows make one split's (params.num_splits CTAs share them).
struct KeyTile {
  int n_block;
  int head_k;
  int batch;
  int split;
};

// One step of such a CTA: a block of query rows of one head, against its keys.
struct Step {
  int m_block;  // -1: the CTA has no step at all
  int head;
  bool masked;
  bool last;  // dK and dV leave the accumulators after it, as partial sums or whole (partial.h)
  bool ends;  // it is the CTA's last
};

template <class Element_, int kHeadDim_, int kHeadDimV_>
struct Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr BwdTile kTile = bwd_tile(kHeadDim);
  static constexpr int kBlockM = kTile.block_m;  // query rows of a step
  static constexpr int kBlockN = kTile.block_n;  // keys of the CTA
  static constexpr bool kFused = kTile.fused;
  static constexpr bool kNarrow = kHeadDim <= 64;  // S and dQ fit into the registers together
  static constexpr int kStages = 2;                // of Q and of dO
  static constexpr int kWritersdQ = kFused ? kStages : 0;  // warps that add dQ: one for each stage

  // One producer warpgroup (a warp loads, two write dQ), then two consumers. Fused: each owns
  // 64 keys. Wide: both own the same 64 keys, one computes dV, the other dK.
  static constexpr int kConsumerThreads = 256;
  static constexpr int kThreads = 128 + kConsumerThreads;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kWarpgroupsN = kFused ? 2 : 1;
  static_assert(kBlockN == 64 * kWarpgroupsN);

  using LayoutK = LayoutRows<kBlockN, kHeadDim, 1>;
  using LayoutKt = LayoutColumns<kBlockN, kHeadDim, 1>;
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
  using MmaGrad = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kDim>, Int<kBlockM>>,
                           GMMA::Major::K, GMMA::Major::MN>(),
      TileN{}));
  // A warpgroup computes 64 rows of dQ. Where the tile has just 64, each computes half the columns.
  static constexpr int kWarpgroupsM = kBlockM / 64;
  static constexpr int kColumnsdQ = kHeadDim * kWarpgroupsM / 2;  // of one warpgroup
  using MmadQ = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<_64, Int<kFused ? kColumnsdQ : 64>, Int<kBlockN>>, GMMA::Major::MN,
                           GMMA::Major::MN>(),
      Layout<Shape<Int<kWarpgroupsM>, Int<2 / kWarpgroupsM>, _1>>{}));
  static_assert(!kFused || tile_size<1>(MmadQ{}) == kHeadDim, "one wgmma must span the tile");
  static_assert(tile_size<1>(MmaScores<kHeadDim>{}) == kBlockM &&
                tile_size<1>(MmaGrad<kHeadDim>{}) == kHeadDim &&
                tile_size<1>(MmaGrad<kHeadDimV>{}) == kHeadDimV);

  static constexpr int kSizeQ = kBlockM * kHeadDim;  // of one stage
  static constexpr int kSizedO = kBlockM * kHeadDimV;
  static constexpr int kSizeK = kBlockN * kHeadDim;
  static constexpr int kSizeV = kBlockN * kHeadDimV;
  static constexpr int kSizedS = kBlockM * kBlockN;  // of one buffer

  struct SharedStorage {
    alignas(1024) uint16_t key[kSizeK];
    alignas(1024) uint16_t value[kSizeV];
    alignas(1024) uint16_t query[kStages * kSizeQ];
    alignas(1024) uint16_t dout[kStages * kSizedO];
    // Fused: dS for dQ. Wide: P, from one warpgroup to the other. Two buffers.
    alignas(1024) uint16_t exchange[2 * kSizedS];
    alignas(1024) float dquery[kFused ? kSizeQ : 1];
    alignas(128) float stats[kStages * row_stats_of_block(kBlockM)];
    alignas(128) int2 intervals[kStages * kBlockM];
    Step steps[kStages];
    FullBarrier key_full;
    FullBarrier value_full;
    FullBarrier staged;  // a tile with rows to be zeroed has landed
    Pipeline<kStages> query_pipeline;
    Pipeline<kStages> dout_pipeline;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace jax_fa3::bwd
