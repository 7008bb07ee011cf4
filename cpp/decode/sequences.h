// Which query rows belong to which sequence, which positions each of them sees, and how that makes
// work: tiles of rows and blocks of positions. Twin of jax_fa3/kv_cache/_sequences.py.
//
// Everything is read on the device, in 32 bits: a CTA's way to its work is code that runs once, and
// waits for its instructions more than for anything else. So positions are at most 2^30, and there
// are limits to rows and work, which the handler checks.
#pragma once

#include <cstdint>

#include "common/mask.h"
#include "decode/divider.h"

// Code that runs once is quicker the shorter it is.
#ifdef __CUDACC__
#define JAX_FA3_NO_UNROLL _Pragma("unroll 1")
#else
#define JAX_FA3_NO_UNROLL
#endif

namespace jax_fa3::decode {

struct Sequence {
  int first_row;
  int count;   // rows
  int length;  // the rows included: row i has position length - count + i
  int begin;   // positions from which on keys are seen
  bool mistaken;
};

struct Sequences {
  int batch;
  int rows;                  // of all, and of none
  int rows_each;             // of a sequence, if not ragged
  int capacity;              // positions that a sequence can have
  int const* lengths;        // [b]
  int const* query_starts;   // [b + 1], or null: all have rows_each
  int const* num_sequences;  // [1], or null: batch
  int const* key_begin;      // [b], or null: 0
  // A ragged call may be two launches, of which one has tall tiles, for
  // sequences of more rows than these, if they are worth it.
  int most_small = INT32_MAX;
  bool tall = false;  // this launch is that one

  // Ragged rows that are no sequence's, at the front and behind the last, are two idle sequences
  // more.
  JAX_FA3_HOST_DEVICE int size() const { return query_starts == nullptr ? batch : batch + 2; }

  JAX_FA3_HOST_DEVICE int num_ours() const {
    int const ours = num_sequences == nullptr ? batch : *num_sequences;
    return ours < 0 ? 0 : (ours > batch ? batch : ours);
  }

  // Whether the rows of sequence i end before they begin. If any do, nobody knows whose are whose:
  // all are then those of sequence 0, which is mistaken.
  JAX_FA3_HOST_DEVICE bool goes_back(int i) const {
    return query_starts != nullptr && i < num_ours() && query_starts[i + 1] < query_starts[i];
  }

  // Sequence i of size(); `back`: whether any goes back.
  JAX_FA3_HOST_DEVICE Sequence at(int i, bool back) const {
    if (query_starts == nullptr) return rectangular(i);
    int const ours = num_ours();
    if (i < batch && !back) {
      return i < ours ? counted(i, query_starts[i], query_starts[i + 1]) : Sequence{};
    }
    int const first = ours == 0 ? 0 : clipped(query_starts[0]);
    int stop = ours == 0 ? 0 : clipped(query_starts[ours]);
    if (back) {
      JAX_FA3_NO_UNROLL
      for (int j = 0; j < ours; ++j) stop = larger(stop, clipped(query_starts[j]));
    }
    if (i < batch) return i == 0 ? Sequence{first, stop - first, 0, 0, true} : Sequence{};
    return i == batch ? Sequence{stop, rows - stop, 0, 0, false} : Sequence{0, first, 0, 0, false};
  }

  // If all have rows_each.
  JAX_FA3_HOST_DEVICE Sequence rectangular(int i) const {
    Sequence const idle{i * rows_each, rows_each, 0, 0, false};
    return i < num_ours() ? counted(i, idle.first_row, idle.first_row + rows_each) : idle;
  }

 private:
  JAX_FA3_HOST_DEVICE static int larger(int a, int b) { return a > b ? a : b; }
  JAX_FA3_HOST_DEVICE int clipped(int row) const { return row < 0 ? 0 : (row > rows ? rows : row); }

  JAX_FA3_HOST_DEVICE Sequence counted(int i, int first, int stop) const {
    int const length = lengths[i];
    bool const mistaken = first < 0 || stop > rows || length > capacity;
    int const begin = key_begin == nullptr ? 0 : key_begin[i];
    return {clipped(first), clipped(stop) - clipped(first), mistaken || length < 0 ? 0 : length,
            begin < 0 ? 0 : begin, mistaken};
  }
};

// Row i sees positions from its own - left to its own + right, both at most kFarthest.
struct Window {
  static constexpr int kFarthest = (1 << 30) - 1;
  int left;
  int right;

  // Of a row of a sequence. Beginnings and ends never decrease from row to row, and with neighbours
  // they leave no gap: so the first row's beginning and the last one's end are those of all.
  JAX_FA3_HOST_DEVICE Interval of(Sequence const& sequence, int row) const {
    int const position = sequence.length - sequence.count + row;
    int const first = position - left;
    int const last = position + right + 1;
    return {first > sequence.begin ? first : sequence.begin,
            last < sequence.length ? last : sequence.length};
  }

  JAX_FA3_HOST_DEVICE Interval of(Sequence const& sequence, int first_row, int last_row) const {
    if (sequence.mistaken || left + right < 0) return {0, 0};
    Interval const all{of(sequence, first_row).begin, of(sequence, last_row).end};
    return all.empty() ? Interval{0, 0} : all;
  }
};

// Query heads that share a KV head are rows of one tile: row r of a sequence's KV head is the
// sequence's row r / group of the head's query head r % group.
struct Tiles {
  Window window;
  Divider group;
  int row_bits;    // a tile has 2^row_bits rows
  int block_bits;  // and a block 2^block_bits positions
  int split;       // blocks that are always summed by themselves, or 0

  JAX_FA3_HOST_DEVICE int count(Sequence const& sequence) const {
    return (sequence.count * group.divisor + (1 << row_bits) - 1) >> row_bits;
  }
  // What the rows of a tile see.
  JAX_FA3_HOST_DEVICE Interval positions(Sequence const& sequence, int tile) const {
    return window.of(sequence, first_row(tile), last_row(sequence, tile));
  }
  JAX_FA3_HOST_DEVICE int first_row(int tile) const { return group(tile << row_bits); }
  JAX_FA3_HOST_DEVICE int last_row(Sequence const& sequence, int tile) const {
    int const behind = (tile + 1) << row_bits;
    return behind < sequence.count * group.divisor ? group(behind - 1) : sequence.count - 1;
  }
  // Work is counted in blocks of positions, or in splits; a tile that sees none still has rows to
  // be written.
  JAX_FA3_HOST_DEVICE int unit_of(int position) const {
    int const block = position >> block_bits;
    return split == 0 ? block : block / split;
  }
  JAX_FA3_HOST_DEVICE int units(Interval const& seen) const {
    return seen.empty() ? 1 : unit_of(seen.end - 1) - unit_of(seen.begin) + 1;
  }
  // Blocks that tiles of 128 rows need not load again, of one KV head, about:
  // both kernels of a ragged call find the same, whatever their tiles are.
  JAX_FA3_HOST_DEVICE int saved_by_tall(Sequence const& sequence) const {
    Interval const seen = window.of(sequence, 0, sequence.count - 1);
    int const tall = (sequence.count * group.divisor + 127) >> 7;
    return seen.empty() ? 0
                        : tall * (((seen.end - 1) >> block_bits) - (seen.begin >> block_bits) + 1);
  }
  // Of one KV head.
  JAX_FA3_HOST_DEVICE int units(Sequence const& sequence) const {
    int sum = 0;
    int const tiles = count(sequence);
    JAX_FA3_NO_UNROLL
    for (int tile = 0; tile < tiles; ++tile) sum += units(positions(sequence, tile));
    return sum;
  }
};

}  // namespace jax_fa3::decode
