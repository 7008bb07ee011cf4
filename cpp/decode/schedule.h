// Who does what: the work of all sequences is one line of units, (sequence, KV head, tile of rows,
// block of positions), cut into equal pieces, one for each CTA. So a CTA shares with others at most
// the first and the last of its tiles, however long the sequences are.
#pragma once

#include <cutlass/cutlass.h>

#include "decode/params.h"

namespace jax_fa3::decode {

// Sequences whose units are kept once they are counted. To count them again takes a CTA a while: it
// waits for the instructions.
inline constexpr int kKnownUnits = 128;

// Blocks of positions of one tile of one KV head.
struct Work {
  bool last;  // there is no more
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
  int units;  // of all
  // From which they follow: units of the tile in front of these, all of the tile, and whether this
  // is the last that the CTA has of one of its parts.
  int skipped;
  int tile_units;
  bool completes;

  static constexpr int kNone = -1;
};

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

// All threads of the CTA: the units of one KV head of all sequences, and whether any sequence goes
// back.
template <class Traits>
CUTLASS_DEVICE int count_units(Params const& params, typename Traits::SharedStorage& storage,
                               bool* back) {
  Sequences const& sequences = params.sequences;
  bool own_back = false;
  if (sequences.query_starts != nullptr) {
    for (int i = threadIdx.x; i < sequences.batch; i += Traits::kThreads) {
      own_back |= sequences.goes_back(i);
    }
  }
  *back = __syncthreads_or(own_back);
  int units = 0;
  for (int i = threadIdx.x; i < sequences.size(); i += Traits::kThreads) {
    int const own = params.tiles.units(sequences.at(i, *back));
    if (i < kKnownUnits) storage.known_units[i] = own;
    units += own;
  }
  units = __reduce_add_sync(~0u, units);
  if (threadIdx.x % 32 == 0) storage.warp_units[threadIdx.x / 32] = units;
  __syncthreads();
  int sum = 0;
  for (int warp = 0; warp < Traits::kThreads / 32; ++warp) sum += storage.warp_units[warp];
  return sum;
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

// What consumers need to know, of a work that begins at `unit`. It is found when keys and values
// are on their way.
CUTLASS_DEVICE void complete(Params const& params, int unit, Piece const& piece, Work* work) {
  Tiles const& tiles = params.tiles;
  int const last_begin =
      tiles.window.of(work->sequence, tiles.last_row(work->sequence, work->tile)).begin;
  work->full_begin = ((min(last_begin, work->positions.end) - 1) >> tiles.block_bits) + 1;
  work->full_end =
      tiles.window.of(work->sequence, tiles.first_row(work->tile)).end >> tiles.block_bits;
  work->units = piece.total;
  if (params.cluster > 0 || !work->completes) return;
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
  CUTLASS_DEVICE Walk(Params const& params, bool back) : params(params), back(back) {}

  // To a unit that there is; known_units: those of the first sequences, of one KV head each.
  CUTLASS_DEVICE void start(int unit, int const (&known_units)[kKnownUnits]) {
    int const lane = threadIdx.x % 32;
    for (int first = 0;; first += 32) {
      int const i = first + lane;
      int of_head = 0;
      if (i < params.sequences.size()) {
        of_head =
            i < kKnownUnits ? known_units[i] : params.tiles.units(params.sequences.at(i, back));
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

  // To what is this CTA's of the tile that its cluster shares; returns how many units.
  CUTLASS_DEVICE int share() {
    int const bits = __ffs(params.cluster) - 1;
    int const rank = static_cast<int>(blockIdx.x) & (params.cluster - 1);
    head = static_cast<int>(blockIdx.x) >> bits;
    enter(static_cast<int>(blockIdx.y));
    enter_tile();
    skipped = tile_units * rank >> bits;
    return (tile_units * (rank + 1) >> bits) - skipped;
  }

  // The next work, of at most `units` units, but for what only consumers need of it.
  CUTLASS_DEVICE Work next(int units) {
    Tiles const& tiles = params.tiles;
    if (!checked && tiles.count(sequence) > 1) {
      lacks_page = !has_pages(params, index, tiles.window.of(sequence, 0, sequence.count - 1));
    }
    checked = true;
    Work work{};
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
      sequence = params.sequences.at(index, back);
      if (sequence.count > 0) break;
    }
    checked = lacks_page = false;
  }

  CUTLASS_DEVICE void enter_tile() {
    positions = params.tiles.positions(sequence, tile);
    tile_units = params.tiles.units(positions);
  }

  Params const& params;
  bool const back;
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
