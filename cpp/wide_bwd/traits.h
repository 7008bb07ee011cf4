// Shape of the machine code of the two backward kernels for wide heads: tiles, clusters, shared
// memory.
#pragma once

#include <cute/tensor.hpp>

#include "bwd/params.h"
#include "bwd/traits.h"
#include "common/layouts.h"
#include "wide_bwd/barriers.h"

namespace jax_fa3::wide_bwd {

using namespace cute;

struct Params : bwd::Params {
  // The same arrays as query, key and dout in boxes of Traits::kRowsOfGrad rows.
  CUtensorMap query_rows, key_rows, dout_rows_map;
};

// kOfKeys: the kernel of dK and dV; else that of dQ.
//
// A CTA has a role. The first computes S and the weights P, and sends P to its peer, the other role
// of the same tile; that one computes dP and dS. Of keys: the first sums dV of 64 keys, the second
// their dK, 512 columns by two warpgroups; two tiles side by side, as they need the same query
// rows, fetch these together: four CTAs. Of queries: dS goes back to the first, and each sums half
// the columns of dQ of 128 rows.
//
// What a CTA needs all the time (K, V; Q, dO) is resident in tiles of 64 rows. All else comes
// through one ring in pieces that both warpgroups read: of the other operand of S or dP 64 columns,
// of the gradient's 16 rows.
template <class Element_, bool kOfKeys_>
struct Traits {
  using Params = wide_bwd::Params;
  using Element = Element_;
  static constexpr bool kOfKeys = kOfKeys_;
  static constexpr bool kHasBias = false;
  static constexpr bool kHasBits = false;
  static constexpr bool kHasAlibi = false;
  static constexpr bool kHasRelative = false;
  static constexpr bool kHasDropout = false;
  static constexpr int kHeadDim = 512;
  static constexpr int kHeadDimV = 512;
  static constexpr int kSlabK = 64;
  static constexpr BwdTile kTile = bwd_tile(kHeadDim);
  static constexpr int kBlockM = kTile.block_m;  // query rows of a step, or of a tile of dQ
  static constexpr int kBlockN = kTile.block_n;  // keys of a cluster
  static constexpr int kKeysOfStep = 64;         // of dQ
  static constexpr int kGradRows = 64;           // that a warpgroup stores
  static_assert(kBlockM == 128 && kBlockN == 128 && kBwdQueryRows == kBlockM);

  static constexpr int kSides = kOfKeys ? 2 : 1;  // tiles of a cluster
  static constexpr int kClusterSize = 2 * kSides;
  static constexpr int kConsumerWarps = 8;
  static constexpr int kThreads = 3 * 128;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;

  // A thread's numbers of S: 64 x 64 a warpgroup. Each piece of the gradient comes with some of
  // them.
  static constexpr int kColumns = 256;    // of a warpgroup's gradient
  static constexpr int kRowsOfGrad = 16;  // of a piece for the gradient: one wgmma
  static constexpr int kPiecesOfScores = kHeadDim / 64;
  static constexpr int kPiecesOfGrad = (kOfKeys ? kBlockM : kKeysOfStep) / kRowsOfGrad;
  static constexpr int kScoresOfPiece = 64 * 64 / 128 / kPiecesOfGrad;

  // In units of 8 KB: 64 x 64 elements, or 16 rows of a warpgroup's columns. Of keys, each
  // warpgroup has its own unit of a piece, as it has its own query rows of S.
  static constexpr int kUnit = 64 * 64;
  static_assert(kUnit == kRowsOfGrad * kColumns);
  static constexpr int kUnitsOfPiece = kOfKeys ? 2 : 1;
  static constexpr int kSizePiece = kUnit * kUnitsOfPiece;
  static constexpr int kStages = kOfKeys ? 6 : 8;
  static constexpr int kTilesResident = kOfKeys ? 1 : 2;
  static constexpr int kSizeTile = 64 * kHeadDim;
  // P or dS: 64 keys of 128 query rows, twice; or each warpgroup's own 64 x 64.
  static constexpr int kBuffers = kOfKeys ? 2 : 1;
  static constexpr int kRecords = kOfKeys ? 2 : 1;  // of query rows, with the steps

  using MmaScores = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, _64, _64>>()));
  using MmaGrad = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kColumns>, Int<kRowsOfGrad>>,
                           GMMA::Major::K, GMMA::Major::MN>()));
  using LayoutResident = LayoutRows<64, 64, kPiecesOfScores>;
  using LayoutScores = LayoutRows<64, 64, kUnitsOfPiece * kStages>;
  using LayoutWeights = LayoutRows<64, 64, 2 * kBuffers>;
  using LayoutGrad = LayoutColumns<kRowsOfGrad, kColumns, kUnitsOfPiece * kStages>;

  struct SharedStorage {
    alignas(1024) uint16_t resident[kTilesResident * kSizeTile];
    alignas(1024) uint16_t weights[2 * kBuffers * kUnit];
    // P on its way to the peer: here it arrives; and from here it goes where it is not among
    // `weights`.
    alignas(1024) uint16_t exchange[2 * kUnit];
    alignas(1024) uint16_t ring[kStages * kSizePiece];
    alignas(128) float stats[kRecords * row_stats_of_block(kBlockM)];
    alignas(128) int2 intervals[kRecords * kBlockM];
    bwd::Step steps[kRecords];
    RingBarriers<kStages, kSides> pieces;
    Pipeline<kRecords> records;
    FullBarrier resident_full;
    FullBarrier staged;        // a resident tile with rows to be zeroed has landed
    FullBarrier received[2];   // by warpgroup: what its peer has sent is there
    EmptyBarrier may_send[2];  // of keys: the peer has read what was sent before
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// Where a CTA stands in its cluster.
template <class Traits>
struct Place {
  int rank;
  int role;  // 0: S, P; 1: dP, dS
  int side;
  int first;  // of the CTAs of this role
  int peer;

  CUTLASS_DEVICE static Place here() {
    // By a shuffle, so that the compiler knows it to be a warp's.
    int const rank = __shfl_sync(~0u, static_cast<int>(cute::block_rank_in_cluster()), 0);
    int const role = rank / Traits::kSides;
    int const side = rank % Traits::kSides;
    return {rank, role, side, role * Traits::kSides, (1 - role) * Traits::kSides + side};
  }
  CUTLASS_DEVICE uint16_t ctas() const { return ((1 << Traits::kSides) - 1) << first; }
};

}  // namespace jax_fa3::wide_bwd
