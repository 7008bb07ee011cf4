// Shape of the machine code of a forward kernel for wide heads: tile, pieces,
// shared memory.
#pragma once

#include <algorithm>
#include <cute/tensor.hpp>

#include "common/layouts.h"
#include "common/softmax.h"
#include "common/tile_scheduler.h"
#include "fwd/params.h"
#include "plan.h"
#include "wide/barriers.h"

namespace jax_fa3::wide {

using namespace cute;

// O of 64 rows and 512 columns fills the registers of two warpgroups. A tile is
// two CTAs' 64 rows each: a cluster, whose CTAs go through the same keys, so
// that either fetches just half of them.
template <class Element_, int kHeadDim_, int kHeadDimV_>
struct Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr FwdTile kTile = fwd_tile(kHeadDim, kHeadDimV, false);
  static constexpr int kRows = 64;  // of one CTA
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static_assert(kBlockM == kClusterSize * kRows && kBlockN == 128);

  // One producer warpgroup, of which a warp works, and two consumers: the first
  // computes S, the weights and half of O's columns, the second the other half.
  static constexpr int kConsumerWarps = 8;
  static constexpr int kThreads = 3 * 128;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kColumns = kHeadDimV / 2;  // of one warpgroup's O
  static_assert(kColumns == 256 && kHeadDim % 64 == 0);

  // K and V come in pieces of 16 KB: of K all keys and 64 columns; of V 32 keys
  // and the columns of one warpgroup, first the first's.
  static constexpr int kPiecesK = kHeadDim / 64;
  static constexpr int kKeysOfPiece = 32;
  static constexpr int kPairsV = kBlockN / kKeysOfPiece;
  static constexpr int kSizePiece = kBlockN * 64;
  static_assert(kSizePiece == kKeysOfPiece * kColumns);

  // Q, in whose memory the output is staged, and P, twice, leave room for so
  // many.
  static constexpr int kSizeQ = kRows * std::max(kHeadDim, kHeadDimV);
  static constexpr int kSizeP = kRows * kBlockN;
  static constexpr int kStages =
      std::min(8, (227 * 1024 - 3072 - 2 * (kSizeQ + 2 * kSizeP)) / (2 * kSizePiece));

  // S = Q K^T piece by piece, and O += P V with P from shared memory, too: the
  // registers are full.
  using MmaQK = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kBlockN>, _64>>()));
  using MmaPV = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kColumns>, Int<kKeysOfPiece>>,
                           GMMA::Major::K, GMMA::Major::MN>()));
  using LayoutQ = LayoutRows<kRows, 64, kPiecesK>;
  using LayoutK = LayoutRows<kBlockN, 64, kStages>;
  using LayoutP = LayoutRows<kRows, kBlockN, 2>;
  using LayoutVt = LayoutColumns<kKeysOfPiece, kColumns, kStages>;

  // Of each row, from the warpgroup that knows it to the other.
  struct RowState {
    float rescale[2][kRows];  // beside the two buffers of P
    float max[kRows];
    float sum[kRows];
    float factor[kRows];
    float offset[kRows];
  };

  struct SharedStorage {
    alignas(1024) uint16_t query[kSizeQ];
    alignas(1024) uint16_t weights[2 * kSizeP];
    alignas(1024) uint16_t ring[kStages * kSizePiece];
    RowState rows;
    RingBarriers<kStages, kClusterSize> barriers;
    FullBarrier query_full;
    WorkTile work;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// A warp's way through the ring: pieces come in one order, which all warps
// follow.
template <class Traits>
struct Ring {
  typename Traits::SharedStorage& storage;
  PipelineState<Traits::kStages> state;

  CUTLASS_DEVICE void wait() { storage.barriers.full[state.stage].wait(state.phase); }
  CUTLASS_DEVICE void release(int stage) { storage.barriers.release(stage); }
  // Pieces for the other warpgroup: read by none of this one, but both must see
  // every piece.
  template <int kCount = 1>
  CUTLASS_DEVICE void pass() {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      wait();
      release(state.stage);
      state.advance();
    }
  }
};

}  // namespace jax_fa3::wide
