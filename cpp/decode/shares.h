// Rectangular calls whose tiles all have about as much to do: each is shared by as many CTAs, in
// equal pieces, or each CTA has as many tiles. So a CTA's way to its work is short, and nobody
// crosses from one tile to the next: while a part is stored and joined, nothing is loaded.
#pragma once

#include "decode/schedule.h"

namespace jax_fa3::decode {

// A sequence, and what its only tile sees.
struct Share {
  Sequence sequence;
  Interval positions;
};

CUTLASS_DEVICE Share find_share(Params const& params, int index) {
  Sequence const sequence = params.sequences.rectangular(index);
  return {sequence, params.tiles.window.of(sequence, 0, sequence.count - 1)};
}

// The one that a lane of the warp knows.
CUTLASS_DEVICE Share share_of_lane(Share const& share, int lane) {
  auto const of_lane = [&](int x) { return __shfl_sync(~0u, x, lane); };
  Sequence const& x = share.sequence;
  return {{of_lane(x.first_row), of_lane(x.count), of_lane(x.length), of_lane(x.begin),
           of_lane(x.mistaken) != 0},
          {of_lane(share.positions.begin), of_lane(share.positions.end)}};
}

// Tiles::units() where there are no splits.
CUTLASS_DEVICE int count_blocks(Params const& params, Interval const& positions) {
  int const bits = params.tiles.block_bits;
  return positions.empty() ? 1 : ((positions.end - 1) >> bits) - (positions.begin >> bits) + 1;
}

// Where a CTA is: its first tile, and which of those that share it.
struct SharePlace {
  int tile;
  int rank;
  int stride = 1;  // from one CTA that shares it to the next

  CUTLASS_DEVICE explicit SharePlace(Params const& params) {
    int const cta = static_cast<int>(blockIdx.x);
    int const group = params.shares(cta);
    rank = cta - group * params.shares.divisor;
    tile = group * params.tiles_of_cta;
  }
};

// All threads of the CTA: whether tiles have about as much to do as the first one. `own` is that of
// the CTA's first tile, in each warp's last lane; there is one copy of this code, for to fetch
// instructions is what takes long.
template <class Traits>
CUTLASS_DEVICE bool are_equal(Params const& params, Share* own) {
  constexpr int kOthers = 30;  // each warp's first lane has the first sequence
  int const batch = params.sequences.batch;
  int const warp = threadIdx.x / 32;
  int const lane = threadIdx.x % 32;
  bool equal = true;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int first = warp * kOthers; first < batch; first += Traits::kThreads / 32 * kOthers) {
    int i = lane == 0 ? 0 : first + lane - 1;
    if (lane == 31) i = params.heads(SharePlace(params).tile);
    *own = find_share(params, min(i, batch - 1));
    int const units = count_blocks(params, own->positions);
    int const wanted = __shfl_sync(~0u, units, 0);
    equal &= abs(units - wanted) * 16 <= wanted || params.always_equal;
  }
  return __syncthreads_and(equal);
}

// A short sequence in a table for a long one is shared by fewer CTAs, of so many positions or more,
// which are then as far apart as there are tiles: neighbours share an SM.
inline constexpr int kLeastPositions = 256;
CUTLASS_DEVICE int share_length(Params const& params, int blocks, SharePlace* place) {
  int const shares = params.shares.divisor;
  int const length = params.shares(blocks + shares - 1);
  int const least = kLeastPositions >> params.tiles.block_bits;
  if (!params.always_equal || params.cluster > 0 || shares == 1 || length >= least) return length;
  place->rank = params.heads(static_cast<int>(blockIdx.x));
  place->tile = params.heads.rest(static_cast<int>(blockIdx.x));
  place->stride = params.num_heads_k;
  return least;
}

// What CTAs with this rank have of a tile, but for what only consumers need of it.
CUTLASS_DEVICE Work share_work(Params const& params, SharePlace place, Share const& share) {
  Work work{};
  work.tile_units = count_blocks(params, share.positions);
  int const length = share_length(params, work.tile_units, &place);
  work.equal = true;
  work.sequence = share.sequence;
  work.index = params.heads(place.tile);
  work.head = place.tile - work.index * params.num_heads_k;
  work.positions = share.positions;
  work.length = length;
  int const first = place.rank * length;
  work.stride = place.stride;
  work.owner = static_cast<int>(blockIdx.x) - place.rank * place.stride;
  work.slot = work.tile_units > length ? min(place.rank, 1) : Work::kNone;
  work.last = place.tile >= params.sequences.batch * params.num_heads_k ||
              (params.cluster == 0 && first >= work.tile_units);
  if (!work.positions.empty()) {
    int const begin = work.positions.begin >> params.tiles.block_bits;
    work.begin = begin + min(first, work.tile_units);
    work.end = begin + min(first + length, work.tile_units);
  }
  return work;
}

// What only consumers need.
template <class Traits>
CUTLASS_DEVICE void count_parts(Params const& params, Work* work) {
  if (params.cluster > 0 || work->slot == Work::kNone) return;
  work->parts = (work->tile_units + work->length - 1) / work->length;
  work->flagged = Traits::kFlags && work->parts <= kMostFlagged && params.slot_rows <= kFlaggedRows;
}

}  // namespace jax_fa3::decode
