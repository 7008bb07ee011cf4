// Who does what: the work of all sequences is one line of units, (sequence, KV head, tile of rows,
// block of positions), cut into equal pieces, one for each CTA. So a CTA shares with others at most
// the first and the last of its tiles, however long the sequences are.
#pragma once

#include <cutlass/cutlass.h>

#include "decode/params.h"

namespace jax_fa3::decode {

// Sequences whose units are kept once they are counted. To count them again takes a CTA a while: it
// waits for the instructions.
inline constexpr int kKnownUnits = 112;

// Blocks of positions of one tile of one KV head.
struct Work {
  bool last;   // there is no more
  bool equal;  // it is an equal share (shares.h)
  Sequence sequence;
  int index;  // of the sequence
  int head;
  int tile;
  Interval positions;        // that the tile's rows see
  int begin, end;            // blocks
  int full_begin, full_end;  // of these blocks all rows see all positions
  // Where its part of the tile goes: nowhere, as it ends what the CTA began (kNone); to the slot of
  // the tile that the CTA begins and others go on with; or to those of one that another has begun.
  int slot;
  bool joins;  // the slot 0 has what comes before: of splits, the CTA sums up those that it begins
  // Where with it the part of a tile is complete: how many there are, and which CTA has begun it.
  int parts;
  int owner;
  int stride;  // from one of these CTAs to the next
  int units;   // of all
  // From which they follow: units of the tile in front of these, all of the tile, and whether this
  // is the last that the CTA has of one of its parts.
  int skipped;
  int tile_units;
  bool completes;
  int length;    // of an equal share
  bool flagged;  // its parts say of themselves that they are there (merge.h)

  static constexpr int kNone = -1;
};

// So many parts of so few rows are read without asking first whether they are there.
inline constexpr int kMostFlagged = 8;
inline constexpr int kFlaggedRows = 8;

// A CTA's piece of the line: the first ones are longer by one. If there is little to do, some have
// none.
struct Piece {
  int total;
  int length;
  int longer;

  JAX_FA3_HOST_DEVICE Piece(int total, Divider const& num_ctas)
      : total(total), length(num_ctas(total)), longer(num_ctas.rest(total)) {}
  JAX_FA3_HOST_DEVICE int begin(int cta) const {
    return cta * length + (cta < longer ? cta : longer);
  }
  // Whose piece a unit is in.
  JAX_FA3_HOST_DEVICE int cta(int unit) const {
    int const in_longer = longer * (length + 1);
    return unit < in_longer ? unit / (length + 1) : longer + (unit - in_longer) / length;
  }
};

// The sequences as this launch has them.
struct Ours {
  bool back = false;   // whether any goes back
  bool apart = false;  // whether tall tiles are for those that have the rows

  CUTLASS_DEVICE Sequence at(Sequences const& all, int i) const {
    Sequence const x = all.at(i, back);
    return all.tall == (apart && x.count > all.most_small) ? x : Sequence{};
  }
};

// The sum over all threads of the CTA. place: where no sum is still being read.
template <class Traits>
CUTLASS_DEVICE int sum_of_threads(typename Traits::SharedStorage& storage, int place, int x) {
  x = __reduce_add_sync(~0u, x);
  if (threadIdx.x % 32 == 0) storage.warp_sums[place][threadIdx.x / 32] = x;
  __syncthreads();
  int sum = 0;
  for (int other : storage.warp_sums[place]) sum += other;
  return sum;
}

// Another kernel takes as long as loading this many blocks, and what it does is not done beside
// other work.
inline constexpr int kWorthAnotherKernel = 4096;

// All threads of the CTA: the units of one KV head of all sequences.
template <class Traits>
CUTLASS_DEVICE int count_units(Params const& params, typename Traits::SharedStorage& storage,
                               Ours* ours) {
  Sequences const& sequences = params.sequences;
  if (sequences.query_starts != nullptr) {
    bool own_back = false;
    for (int i = threadIdx.x; i < sequences.batch; i += Traits::kThreads) {
      own_back |= sequences.goes_back(i);
    }
    ours->back = __syncthreads_or(own_back);
    if (sequences.most_small < INT32_MAX) {
      int saved = 0;
      for (int i = threadIdx.x; i < sequences.size(); i += Traits::kThreads) {
        Sequence const x = sequences.at(i, ours->back);
        if (x.count > sequences.most_small) saved += params.tiles.saved_by_tall(x);
      }
      saved = sum_of_threads<Traits>(storage, 0, saved);
      ours->apart = saved * params.num_heads_k >= kWorthAnotherKernel;
      if (sequences.tall && !ours->apart) return 0;
    }
  }
  int units = 0;
  for (int i = threadIdx.x; i < sequences.size(); i += Traits::kThreads) {
    int const own = params.tiles.units(ours->at(sequences, i));
    if (i < kKnownUnits) storage.known_units[i] = own;
    units += own;
  }
  return sum_of_threads<Traits>(storage, 1, units);
}

// Whether all pages exist that rows of a sequence see; by one warp.
CUTLASS_DEVICE bool has_pages(Params const& params, int index, Interval const& positions) {
  if (params.page_table == nullptr || positions.empty()) return true;
  int const* const table = params.page_table + int64_t{index} * params.pages_per_sequence;
  int const last = params.page_size(positions.end - 1);
  bool lacks = false;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int i = params.page_size(positions.begin) + threadIdx.x % 32; i <= last; i += 32) {
    lacks |= static_cast<unsigned>(table[i]) >= static_cast<unsigned>(params.num_pages);
  }
  return !__any_sync(~0u, lacks);
}

// What only consumers need to know of a work is found when keys and values are on their way: blocks
// without a mask,
CUTLASS_DEVICE void find_full(Params const& params, Work* work) {
  Tiles const& tiles = params.tiles;
  int const last_begin =
      tiles.window.of(work->sequence, tiles.last_row(work->sequence, work->tile)).begin;
  work->full_begin = ((min(last_begin, work->positions.end) - 1) >> tiles.block_bits) + 1;
  work->full_end =
      tiles.window.of(work->sequence, tiles.first_row(work->tile)).end >> tiles.block_bits;
}

// and of one that begins at `unit`, what becomes of it.
CUTLASS_DEVICE void complete(Params const& params, int unit, Piece const& piece, Work* work) {
  Tiles const& tiles = params.tiles;
  work->units = piece.total;
  if (!work->completes) return;
  bool const begun = work->skipped == 0 || work->joins;
  int const first_unit = unit - work->skipped;
  int const last_unit = first_unit + work->tile_units - 1;
  work->owner = begun ? static_cast<int>(blockIdx.x) : piece.cta(first_unit);
  work->parts = tiles.split > 0 ? last_unit - piece.begin(work->owner + 1) + 2
                                : piece.cta(last_unit) - work->owner + 1;
}

// One warp: walks along a CTA's piece, and hands out what it finds.
class Walk {
 public:
  CUTLASS_DEVICE Walk(Params const& params, Ours ours) : params(params), ours(ours) {}

  // To a unit that there is; known_units: those of the first sequences, of one KV head each.
  CUTLASS_DEVICE void start(int unit, int const (&known_units)[kKnownUnits]) {
    int const lane = threadIdx.x % 32;
    for (int first = 0;; first += 32) {
      int const i = first + lane;
      int of_head = 0;
      if (i < params.sequences.size()) {
        of_head =
            i < kKnownUnits ? known_units[i] : params.tiles.units(ours.at(params.sequences, i));
      }
      int const units = of_head * params.num_heads_k;
      int sum = units;  // up to this lane
      CUTLASS_PRAGMA_UNROLL
      for (int step = 1; step < 32; step *= 2) {
        int const other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
      }
      unsigned const beyond = __ballot_sync(~0u, sum > unit);
      if (beyond == 0) {
        unit -= __shfl_sync(~0u, sum, 31);
        continue;
      }
      int const found = __ffs(static_cast<int>(beyond)) - 1;
      unit -= __shfl_sync(~0u, sum - units, found);
      enter(first + found);
      of_head = __shfl_sync(~0u, of_head, found);
      head = unit / of_head;
      skipped = unit - head * of_head;
      CUTLASS_PRAGMA_NO_UNROLL
      for (tile = 0; enter_tile(), skipped >= tile_units; ++tile) skipped -= tile_units;
      begun = skipped == 0;
      return;
    }
  }

  // The next work, of at most `units` units, but for what only consumers need of it.
  CUTLASS_DEVICE Work next(int units) {
    Tiles const& tiles = params.tiles;
    if (!checked && tiles.count(sequence) > 1) {
      lacks_page = !has_pages(params, index, tiles.window.of(sequence, 0, sequence.count - 1));
    }
    checked = true;
    Work work{};
    work.stride = 1;
    work.sequence = sequence;
    work.sequence.mistaken |= lacks_page;
    work.index = index;
    work.head = head;
    work.tile = tile;
    // Pages that lack leave the units as they are: all CTAs count alike.
    int const most = tiles.split == 0 ? tile_units : 1;
    taken = min(min(tile_units - skipped, most), units);
    if (!lacks_page) work.positions = positions;
    if (!work.positions.empty()) {
      int const bits = tiles.block_bits;
      int const blocks = max(tiles.split, 1);  // of a unit
      int const first = tiles.unit_of(positions.begin) + skipped;
      work.begin = max(first * blocks, positions.begin >> bits);
      work.end = min((first + taken) * blocks, ((positions.end - 1) >> bits) + 1);
    }
    bool const is_end = skipped + taken == tile_units;
    work.slot = begun ? (is_end ? Work::kNone : 0) : 1 + pieces++;
    work.joins = begun && skipped > 0;
    work.skipped = skipped;
    work.tile_units = tile_units;
    work.completes = work.slot != Work::kNone && (!begun || taken == units);
    return work;
  }

  // Behind it; returns how many units it has.
  CUTLASS_DEVICE int advance() {
    skipped += taken;
    if (skipped < tile_units) return taken;
    skipped = 0;
    begun = true;
    if (++tile == params.tiles.count(sequence)) {
      tile = 0;
      if (++head == params.num_heads_k) {
        head = 0;
        enter(index + 1);
      }
    }
    enter_tile();
    return taken;
  }

 private:
  // The next sequence from there on that has rows, if there is one.
  CUTLASS_DEVICE void enter(int next_index) {
    CUTLASS_PRAGMA_NO_UNROLL
    for (index = next_index; index < params.sequences.size(); ++index) {
      sequence = ours.at(params.sequences, index);
      if (sequence.count > 0) break;
    }
    checked = lacks_page = false;
  }

  CUTLASS_DEVICE void enter_tile() {
    positions = params.tiles.positions(sequence, tile);
    tile_units = params.tiles.units(positions);
  }

  Params const& params;
  Ours const ours;
  int index = 0;  // of the sequence
  Sequence sequence{};
  bool checked = false;  // its pages, where it has several tiles
  bool lacks_page = false;
  int head = 0;
  int tile = 0;
  Interval positions{};  // of the tile
  int tile_units = 0;
  int skipped = 0;    // of these
  int taken = 0;      // of the work at hand
  bool begun = true;  // the tile's first unit is this CTA's
  int pieces = 0;     // of a tile that another has begun
};

}  // namespace jax_fa3::decode
