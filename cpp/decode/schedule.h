// Who does what: the work of all sequences is one line of units, (sequence, KV head, tile of rows,
// block of positions), cut into equal pieces, one for each CTA. So a CTA shares with others at most
// the first and the last of its tiles, however long the sequences are.
#pragma once

#include <cutlass/cutlass.h>

#include "decode/params.h"

namespace jax_fa3::decode {

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

  static constexpr int kNone = -1;
};

// A CTA's piece of the line: the first ones are longer by one. If there is little to do, some have
// none.
struct Piece {
  int total;
  int length;
  int longer;

  JAX_FA3_HOST_DEVICE Piece(int total, int num_ctas)
      : total(total), length(total / num_ctas), longer(total % num_ctas) {}
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
    units += params.tiles.units(sequences.at(i, *back));
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
  int const last = (positions.end - 1) / params.page_size;
  bool lacks = false;
  for (int i = positions.begin / params.page_size + threadIdx.x % 32; i <= last; i += 32) {
    lacks |= static_cast<unsigned>(table[i]) >= static_cast<unsigned>(params.num_pages);
  }
  return !__any_sync(~0u, lacks);
}

// One warp: walks along a CTA's piece, and hands out what it finds.
class Walk {
 public:
  CUTLASS_DEVICE Walk(Params const& params, bool back) : params(params), back(back) {}

  // To a unit that there is.
  CUTLASS_DEVICE void start(int unit) {
    int const lane = threadIdx.x % 32;
    for (int first = 0;; first += 32) {
      int const i = first + lane;
      int of_head = 0;
      if (i < params.sequences.size()) {
        of_head = params.tiles.units(params.sequences.at(i, back));
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
      int rest = unit - head * of_head;
      for (tile = 0; rest >= units_of_tile(); ++tile) rest -= units_of_tile();
      skipped = rest;
      begun = skipped == 0;
      return;
    }
  }

  CUTLASS_DEVICE int units_of_tile() const { return params.tiles.units(sequence, tile); }

  // The next work, of at most `units` units, from `unit` on.
  CUTLASS_DEVICE Work next(int unit, int units, Piece const& piece, int* taken) {
    Tiles const& tiles = params.tiles;
    if (!checked && tiles.count(sequence) > 1) {
      Interval const seen = tiles.window.of(sequence, 0, sequence.count - 1);
      sequence.mistaken |= !has_pages(params, index, seen);
    }
    checked = true;
    Work work{};
    work.sequence = sequence;
    work.index = index;
    work.head = head;
    work.tile = tile;
    work.positions = tiles.positions(sequence, tile);
    // Pages that lack leave the units as they are: all CTAs count alike.
    int const all = units_counted();
    int const most = tiles.split == 0 ? all : 1;
    int const count = min(min(all - skipped, most), units);
    if (!work.positions.empty()) {
      int const bits = tiles.block_bits;
      int const blocks = max(tiles.split, 1);  // of a unit
      int const first = tiles.unit_of(work.positions.begin) + skipped;
      work.begin = max(first * blocks, work.positions.begin >> bits);
      work.end = min((first + count) * blocks, ((work.positions.end - 1) >> bits) + 1);
      int const last_begin = tiles.window.of(sequence, tiles.last_row(sequence, tile)).begin;
      work.full_begin = ((min(last_begin, work.positions.end) - 1) >> bits) + 1;
      work.full_end = tiles.window.of(sequence, tiles.first_row(tile)).end >> bits;
    }
    bool const is_end = skipped + count == all;
    work.slot = begun ? (is_end ? Work::kNone : 0) : 1 + pieces++;
    work.joins = begun && skipped > 0;
    if (begun && !is_end && count == units) {
      int const behind = unit + count;
      int const rest = all - skipped - count;
      int const parts =
          tiles.split > 0 ? rest : piece.cta(behind + rest - 1) - static_cast<int>(blockIdx.x);
      if (threadIdx.x % 32 == 0) {
        params.splits[blockIdx.x] = {1 + parts, sequence.first_row, sequence.count, head, tile,
                                     behind,    piece.total};
      }
    }
    *taken = count;
    if (is_end) {
      skipped = 0;
      begun = true;
      if (++tile == tiles.count(sequence)) {
        tile = 0;
        if (++head == params.num_heads_k) {
          head = 0;
          enter(index + 1);
        }
      }
    } else {
      skipped += count;
    }
    return work;
  }

 private:
  // The next sequence from there on that has rows, if there is one.
  CUTLASS_DEVICE void enter(int next_index) {
    for (index = next_index; index < params.sequences.size(); ++index) {
      sequence = params.sequences.at(index, back);
      if (sequence.count > 0) break;
    }
    counted_mistaken = sequence.mistaken;
    checked = false;
  }

  CUTLASS_DEVICE int units_counted() const {
    Sequence counted = sequence;
    counted.mistaken = counted_mistaken;
    return params.tiles.units(counted, tile);
  }

  Params const& params;
  bool const back;
  int index = 0;  // of the sequence
  Sequence sequence{};
  bool checked = false;  // its pages, where it has several tiles
  bool counted_mistaken = false;
  int head = 0;
  int tile = 0;
  int skipped = 0;    // units of the tile
  bool begun = true;  // the tile's first unit is this CTA's
  int pieces = 0;     // of a tile that another has begun
};

}  // namespace jax_fa3::decode
