// Host decisions: tile sizes, order of tiles, grid. Pure functions, tested without a GPU.
#pragma once

#include <cstdint>

#include "common/mask.h"
#include "common/tile_scheduler.h"
#include "kernel_sizes.h"

namespace jax_fa3 {

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

struct FwdTile {
  int block_m;
  int block_n;
  bool out_over_value;  // the output tile borrows V's shared memory
};

constexpr FwdTile fwd_tile(int head_dim, int head_dim_v, bool few_keys) {
  KernelSize const size = size_for(head_dim, head_dim_v);
  return {few_keys ? size.block_m_few_keys : size.block_m, size.block_n, size.out_over_value};
}

// Keys of which the forward sums O in one accumulator (fwd/long_sums.h).
constexpr int kMostKeysOfSum = 1 << 18;

// fp32 numbers of a CTA's workspace for sums over more.
constexpr int64_t long_sums_of_cta(int block_m, int head_dim_v) {
  return int64_t{block_m} * (head_dim_v + 8);
}

// CTAs that there is workspace for: an H100 or H200 has 132 SMs, of which each takes one.
constexpr int kMostCtas = 132;

// Whether the backward's main kernel is that of bwd/paired.h.
constexpr bool is_paired(BwdTile const& tile) { return tile.fused && tile.block_n < 128; }

// Whether there are kernels with a bias, dense or by distance, or with slopes: up to head dim 128.
// Above, the backward had no registers for one: its two kernels spilled 4 to 28 bytes.
constexpr bool takes_bias(int head_dim) {
  return bwd_tile(head_dim).fused && !is_paired(bwd_tile(head_dim));
}

// Query rows and keys of a block that a dense mask hides or shows as a whole; in the backward it
// has the query rows of the tile. There are kernels with one where tiles have as many keys, that
// is up to head dim 128.
constexpr int kMaskBlock = 128;
constexpr bool takes_mask_bits(int head_dim) { return takes_bias(head_dim); }

constexpr int kDropoutWhole = 1 << 18;  // of so many weights Problem::dropout are dropped

// Whether there are kernels with dropout.
constexpr bool takes_dropout(KernelSize const& size) {
  return size.head_dim == size.head_dim_v && (size.head_dim == 64 || size.head_dim == 128);
}

// The backward's tile where there is a bias, whose slabs of 64 query rows need room.
constexpr BwdTile bwd_tile(int head_dim, bool has_bias) {
  BwdTile tile = bwd_tile(head_dim);
  if (has_bias) tile.block_m = 64;
  return tile;
}

inline constexpr int kBwdConsumerThreads = 256;  // of a CTA of the main kernel, up to head dim 256

// CTAs of the backward that a block of keys takes: a cluster of four where heads are wide.
constexpr int bwd_ctas_of_keys(int head_dim) { return head_dim > 256 ? 4 : 1; }

// The head dim that the backward kernel for `head_dim` computes with.
constexpr int bwd_width(int head_dim) { return bwd_tile(head_dim).head_dim; }

constexpr int row_stats_of_block(int block_m) { return 3 * block_m + 4; }  // of bwd/params.h
constexpr int kQueryBlockInts = 8;
// Blocks of query rows, one for each lane of a warp, whose intervals have a hull together: the
// backward passes over them at once.
constexpr int kBlocksOfHull = 32;

// Query rows over which dK and dV are summed in the accumulators: as it adds, wgmma cuts off what
// does not fit, towards 0, so a longer sum drifts (0.04 % here, 4.9 % over 8 million rows of one
// sign).
constexpr int kMostRowsOfSum = 1 << 16;

// Elements of the backward's workspace (problem.h); partial_dq: dQ is accumulated over several
// calls.
struct BwdWorkspace {
  int64_t row_stats, row_intervals, query_blocks, dq_accum, turns, ranges;
};

// CTAs that share the query rows of a block of keys, at most.
constexpr int kMostSplits = 1024;

constexpr BwdWorkspace bwd_workspace(int64_t batch, int64_t seqlen_q, int64_t num_heads_q,
                                     int64_t num_heads_k, int head_dim, bool partial_dq,
                                     bool has_bias = false) {
  BwdTile const tile = bwd_tile(head_dim, has_bias);
  int64_t const blocks = ceil_div(seqlen_q, tile.block_m);
  int64_t const rows = blocks * tile.block_m;
  int64_t const heads = batch * num_heads_q;
  int64_t const summed_rows =
      tile.fused ? rows : (partial_dq ? ceil_div(seqlen_q, kBwdQueryRows) * kBwdQueryRows : 0);
  return {heads * blocks * row_stats_of_block(tile.block_m),
          batch * rows * 2,
          batch * (blocks + ceil_div(blocks, kBlocksOfHull)) * kQueryBlockInts,
          heads * summed_rows * tile.head_dim,
          tile.fused ? heads * blocks : 0,
          batch * num_heads_k * 3};
}

// Keys that a row sees at most, by the sizes and the window alone.
constexpr int64_t most_visible_keys(Mask const& mask) {
  if (mask.window_left == kUnbounded || mask.window_right == kUnbounded) return mask.seqlen_k;
  int64_t const window = mask.window_left + mask.window_right + 1;
  return window < mask.seqlen_k ? window : mask.seqlen_k;
}

constexpr bool few_keys(Mask const& mask) {
  return mask.restricts() && most_visible_keys(mask) <= 256;
}

// Query heads whose K and V fit into the part of the L2 cache that is counted on, as whole groups
// of the query heads that share a KV head: tiles of those heads run next to each other. (The
// forward takes so many last, and before them fewer at a time: fwd/order.h.)
constexpr int64_t heads_per_section(int64_t seqlen_k, int64_t head_dim, int64_t head_dim_v,
                                    int group) {
  constexpr int64_t kL2Budget = int64_t{32} << 20;  // bytes, of the 50 MB of an H100 or H200
  int64_t const bytes = seqlen_k * (head_dim + head_dim_v) * 2;
  int64_t kv_heads = bytes == 0 ? kL2Budget : kL2Budget / bytes;
  if (kv_heads < 1) kv_heads = 1;
  if (kv_heads > 1024) kv_heads = 1024;
  return kv_heads * group;
}

// By how much longer sections are where each row says where its keys begin, as in documents packed
// into a row. Tiles that run at the same time see just a few of the documents, so more heads fit
// the cache; and the documents' lengths differ, so a section is not dealt out longest first: its
// end costs, and must come seldom.
constexpr int section_factor(Mask const& mask) { return mask.key_begin == nullptr ? 1 : 4; }

struct Sizes {
  int batch, seqlen_q, seqlen_k, num_heads_q, num_heads_k, head_dim, head_dim_v;
};

// The order of the backward's CTAs: blocks of keys of (KV head, split), the splits of a head next
// to each other. Under a mask, heads whose operands fit into the L2 cache together run at the same
// time. So they do without a mask where gradients are deterministic (`in_turn`): there the key
// blocks of one head add to dQ one after the other, and would wait if they all started together. A
// block's turn may also come after one of another split of its head: so all splits of a head are in
// one section, or that one might never begin.
constexpr TileOrder bwd_order(Sizes const& p, int kernel_head_dim, int num_splits, bool masked,
                              bool in_turn, int factor = 1) {
  int const heads = p.num_heads_k * num_splits;
  int const shared = ceil_div(p.num_heads_q / p.num_heads_k, num_splits);
  // Q, dO and the sum of dQ in fp32.
  int64_t section = masked || in_turn ? heads_per_section(int64_t{p.seqlen_q} * shared,
                                                          3 * p.head_dim, p.head_dim_v, 1)
                                      : num_splits;
  section = in_turn ? ceil_div(section, num_splits) * num_splits : section * factor;
  int64_t const most = int64_t{heads} * p.batch;
  if (section > most) section = most;
  return {ceil_div(p.seqlen_k, bwd_tile(kernel_head_dim).block_n), heads, p.batch,
          static_cast<int>(section), !in_turn};
}

// Whether the FP8 forward transposes V itself, while it works on its tiles, of which `readers` read
// each block of V if nothing is masked. Its warps are slower at that than a kernel of its own, so
// it pays only if a block of V has several readers (with arrays per row their number is not known
// here), and if there are tiles for all SMs.
constexpr bool transposes_in_forward(Mask const& mask, int64_t readers, int num_tiles,
                                     int num_sms) {
  constexpr int kLeastReaders = 5;
  bool const known = mask.key_begin == nullptr && mask.key_end == nullptr;
  return known && mask.seqlen_k > 0 && num_tiles >= num_sms &&
         readers * most_visible_keys(mask) >= kLeastReaders * int64_t{mask.seqlen_k};
}

}  // namespace jax_fa3
