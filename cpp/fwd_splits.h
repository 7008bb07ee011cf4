// How many CTAs share the keys of a tile in the forward. A pure function, as those of plan.h.
#pragma once

#include "plan.h"

namespace jax_fa3 {

// fp32 numbers that each of several CTAs that share the keys of the forward's tiles leaves behind
// of all rows: O, and the log-sum-exp in two (fwd/parts.h).
constexpr int64_t fwd_split_size(Sizes const& p) {
  return int64_t{p.batch} * p.num_heads_q * p.seqlen_q * (p.head_dim_v + 2);
}

// Where nothing is masked. 1 unless more are 5 % faster at least, counted in the time that a CTA
// takes for a block of keys: the longest CTA's blocks, its tiles' beginnings and ends, and what it
// takes to join the parts.
constexpr int fwd_splits(Sizes const& p, FwdTile tile) {
  constexpr double kOfTile = 2.5;
  constexpr double kOfJoining = 2;
  constexpr double kBytes = 6e6;  // written and read in that time
  constexpr int kMost = 32;
  constexpr int64_t kMostTiles = 8 * kMostCtas;  // which bounds the workspace
  int64_t const heads = int64_t{p.num_heads_q} * p.batch;
  int const tiles_of_head = ceil_div(p.seqlen_q, tile.block_m);
  if (heads > kMostTiles || tiles_of_head * heads > kMostTiles / 2) return 1;
  int64_t const tiles = tiles_of_head * heads;
  int const blocks = ceil_div(p.seqlen_k, tile.block_n);
  int found = 1;
  double shortest = 0;
  for (int splits = 1; splits <= kMost && splits <= blocks && tiles * splits <= kMostTiles;
       ++splits) {
    double time = ceil_div(tiles * splits, kMostCtas) * (ceil_div(blocks, splits) + kOfTile);
    if (splits > 1) time += kOfJoining + 8. * splits * fwd_split_size(p) / kBytes;
    if (splits == 1 || time < (found == 1 ? 0.95 : 1) * shortest) {
      found = splits;
      shortest = time;
    }
  }
  return found;
}

}  // namespace jax_fa3
