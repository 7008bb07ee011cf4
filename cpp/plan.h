// Host decisions: tile sizes, order of tiles, grid. Pure functions, tested without a GPU.
#pragma once

#include <cstdint>

#include "common/mask.h"

namespace jax_fa3 {

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

struct FwdTile {
  int block_m;
  int block_n;
  bool out_over_value;  // the output tile borrows V's shared memory: no room for one of its own
};

// The measured reasons stand in cpp/README.md. `few_keys`: the mask leaves the rows of a tile few
// keys, so that a tall tile would mostly compute what is masked.
constexpr FwdTile fwd_tile(int head_dim, int head_dim_v, bool few_keys) {
  if (head_dim <= 64) return {few_keys ? 128 : 192, 128, false};
  if (head_dim <= 128) return {128, 128, false};
  if (head_dim <= 192 && head_dim_v <= 128) return {128, 128, true};
  if (head_dim <= 192) return {128, 96, true};
  return {128, 80, true};
}

struct BwdTile {
  int block_m;
  int block_n;
  bool fused;  // one kernel computes all three gradients and sums dQ in fp32 in global memory;
               // else dQ has a kernel of its own
};

// The head dim that the backward kernel for `head_dim` computes with.
constexpr int bwd_width(int head_dim) {
  if (head_dim <= 64) return 64;
  if (head_dim <= 128) return 128;
  return head_dim <= 192 ? 192 : 256;
}

constexpr BwdTile bwd_tile(int head_dim) {
  if (head_dim <= 64) return {128, 128, true};
  if (head_dim <= 128) return {64, 128, true};
  return {64, 64, false};
}

constexpr int kBwdQueryRows = 128;  // of a tile of dQ's own kernel

// Elements of the backward's workspace (problem.h); sums_dq: over several calls.
struct BwdWorkspace {
  int64_t row_stats, row_intervals, block_hulls, dq_accum, turns;
};

constexpr BwdWorkspace bwd_workspace(int64_t batch, int64_t seqlen_q, int64_t num_heads_q,
                                     int head_dim, bool sums_dq) {
  BwdTile const tile = bwd_tile(head_dim);
  int64_t const blocks = ceil_div(seqlen_q, tile.block_m);
  int64_t const rows = blocks * tile.block_m;
  int64_t const heads = batch * num_heads_q;
  int64_t const summed_rows =
      tile.fused ? rows : (sums_dq ? ceil_div(seqlen_q, kBwdQueryRows) * kBwdQueryRows : 0);
  return {heads * rows * 2, batch * rows * 2, batch * blocks * 4,
          heads * summed_rows * bwd_width(head_dim), tile.fused ? heads * blocks : 0};
}

// Keys that a row sees at most, by the sizes and the window alone.
constexpr int64_t most_visible_keys(Mask const& mask) {
  if (mask.window_left == kUnbounded || mask.window_right == kUnbounded) return mask.seqlen_k;
  int64_t const window = mask.window_left + mask.window_right + 1;
  return window < mask.seqlen_k ? window : mask.seqlen_k;
}

constexpr bool few_keys(Mask const& mask) {
  return mask.restricts() && most_visible_keys(mask) <= 1024;
}

// Query heads whose K and V fit into the part of the L2 cache that is counted on, as whole groups
// of the query heads that share a KV head: tiles of those heads run next to each other.
constexpr int64_t heads_per_section(int64_t seqlen_k, int64_t head_dim, int64_t head_dim_v,
                                    int group) {
  constexpr int64_t kL2Budget = int64_t{32} << 20;  // bytes, of the 50 MB of an H100 or H200
  int64_t const bytes = seqlen_k * (head_dim + head_dim_v) * 2;
  int64_t kv_heads = bytes == 0 ? kL2Budget : kL2Budget / bytes;
  if (kv_heads < 1) kv_heads = 1;
  if (kv_heads > 1024) kv_heads = 1024;
  return kv_heads * group;
}

// Whether the FP8 forward transposes V beside its tiles, of which `readers` read each block of V if
// nothing is masked. Its warps are slower at it than a kernel of its own, so what there is of V
// must be little beside the work on it; what arrays per row leave of that is not known here. And
// all SMs must have a part in it.
constexpr bool transposes_beside(Mask const& mask, int64_t readers, int num_tiles, int num_sms) {
  constexpr int kLeastReaders = 5;
  bool const known = mask.key_begin == nullptr && mask.key_end == nullptr;
  return known && mask.seqlen_k > 0 && num_tiles >= num_sms &&
         readers * most_visible_keys(mask) >= kLeastReaders * int64_t{mask.seqlen_k};
}

}  // namespace jax_fa3
