// The decoding kernel's workspace. Pure functions, for the host.
#pragma once

#include <cstdint>

#include "decode/sequences.h"
#include "plan.h"

namespace jax_fa3::decode {

// Rows of a tile that there can be.
inline int slot_rows(Sequences const& sequences, int group, int block_m) {
  bool const ragged = sequences.query_starts != nullptr;
  int64_t const rows = ragged ? sequences.rows : sequences.rows_each;
  int64_t const most = rows * group;
  return static_cast<int>(most < block_m ? most : block_m);
}

// More than there can be of work, which is counted in 32 bits: tiles of 64 rows, or of 16 where
// sequences have one on average; blocks of 32 positions.
inline double most_units(Sequences const& sequences, int group, int num_heads_k) {
  double const tiles = double(sequences.rows) * group / 64 + 2.0 * (sequences.batch + 2);
  return tiles * num_heads_k * (double(sequences.capacity) / 32 + 2);
}

// Parts of tiles that a CTA may have to keep.
inline int slots(Sequences const& sequences, int split_size) {
  int const splits = split_size == 0 ? 2 : ceil_div(sequences.capacity, split_size);
  return splits < 2 ? 2 : splits;
}

// An SM takes two CTAs of 64 rows, or one of 128.
constexpr int kMostDecodeCtas = 2 * kMostCtas;
// Those of a second kernel, of 128 rows, have their own counters.
constexpr int kMostCounters = kMostDecodeCtas + kMostCtas;

struct Workspace {  // in numbers of 32 bits
  int64_t partials, arrivals;
};

inline Workspace workspace(Sequences const& sequences, int group, int head_dim_v, int split_size) {
  int64_t const rows = int64_t{kMostDecodeCtas} * slot_rows(sequences, group, 64);
  return {rows * slots(sequences, split_size) * (head_dim_v + 1), 2 * kMostCounters};
}

}  // namespace jax_fa3::decode
