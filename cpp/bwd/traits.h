// Shape of the machine code of the main backward kernel: tile, warpgroups, shared memory.
#pragma once

#include <cute/tensor.hpp>

#include "common/barriers.h"
#include "common/layouts.h"
#include "plan.h"

namespace jax_fa3::bwd {

using namespace cute;

// Hardware barriers of the CTA.
enum class NamedBarrier : uint32_t {
  kDScoresWritten = 1,     // fused: a warpgroup has written its part of dS; by warpgroup and buffer
  kDQueryFull = 5,         // fused: its part of dQ is in shared memory; by warpgroup and dQ writer
  kDQueryEmpty = 9,        // fused: it has left shared memory again; by warpgroup
  kProbabilitiesFull = 5,  // wide: P has been handed from one warpgroup to the other; by buffer
  kProbabilitiesEmpty = 7,  // wide: it has been taken
  kKeyRead = 9,             // wide: nobody needs K any more: its memory may hold dK
  kValueRead = 10,          // wide: likewise V and dV
  kKeysRead = 13,           // fused: likewise K and dK
  kGradOfWarpgroup0 = 14,   // the threads of one warpgroup, around their gradient tile
  kGradOfWarpgroup1,
};

// 1 to 15, for 0 is that of __syncthreads: also those that CUTLASS reserves, whose users are not
// used here. A plain number would be counted from the end of those.
using BarrierId = cutlass::arch::ReservedNamedBarriers;
static_assert(static_cast<uint32_t>(NamedBarrier::kGradOfWarpgroup1) <= 15);

CUTLASS_DEVICE BarrierId barrier_id(NamedBarrier first, int offset = 0) {
  return static_cast<BarrierId>(static_cast<uint32_t>(first) + offset);
}

// One step of a CTA: a block of query rows of one head, against the CTA's keys.
struct Step {
  int m_block;  // -1: there is no step at all
  int head;
  bool masked;
  bool last;  // of a part, after which dK and dV leave the accumulators (parts.h)
  bool ends;  // the CTA's last: there is no other part
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
  static constexpr bool kNarrow = kHeadDim <= 64;          // registers for S and dQ at once
  static constexpr int kStages = 2;                        // of Q and of dO
  static constexpr int kWritersdQ = kFused ? kStages : 0;  // warps: one for the steps of a stage

  // One producer warpgroup (a warp loads, two write dQ), then two consumers. Fused: each owns
  // 64 keys. Wide: both own the same 64 keys, one computes dV, the other dK.
  static constexpr int kConsumerThreads = 256;
  static constexpr int kThreads = 128 + kConsumerThreads;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kWarpgroupsN = kFused ? 2 : 1;
  static_assert(kBlockN == 64 * kWarpgroupsN);

  static constexpr int kSlab = slab(kHeadDim);
  static constexpr int kSlabV = slab(kHeadDimV);
  using LayoutK = LayoutRows<kBlockN, kHeadDim, 1>;
  using LayoutKt = LayoutColumns<kBlockN, kHeadDim, 1>;
  using LayoutV = LayoutRows<kBlockN, kHeadDimV, 1>;
  using LayoutQ = LayoutRows<kBlockM, kHeadDim, kStages>;
  using LayoutQt = LayoutColumns<kBlockM, kHeadDim, kStages>;
  using LayoutdO = LayoutRows<kBlockM, kHeadDimV, kStages>;
  using LayoutdOt = LayoutColumns<kBlockM, kHeadDimV, kStages>;
  // dS as the A operand [m, n] of dQ, from dS^T [n, m] in slabs of 64 query rows.
  using LayoutdS = LayoutColumns<kBlockN, kBlockM, 2>;

  // S^T = K Q^T and dP^T = V dO^T from shared memory; dV += P^T dO and dK += dS^T Q with P^T and
  // dS^T in registers, in which they are the accumulators of the former; dQ = dS K from shared
  // memory.
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
  static constexpr int kWarpgroupsM = kBlockM / 64;  // of dQ; the others share its columns
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
