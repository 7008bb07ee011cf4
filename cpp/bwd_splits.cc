// bwd_splits.h: simulates the CTAs of each number of splits, and takes the quickest.
#include "bwd_splits.h"

#include <algorithm>
#include <functional>
#include <queue>
#include <vector>

namespace jax_fa3 {
namespace {

constexpr double kFixed = 1.5;          // steps' worth of time that a CTA takes besides
constexpr double kFixedOfPartial = 1.;  // and to write 4 bytes a number instead of 2
constexpr double kFlopsPerSm = 4.2e12;
constexpr double kBytesPerSecond = 3.5e12;
constexpr double kLaunch = 2e-6;     // seconds
constexpr int kMostTiles = 1 << 16;  // of which the order is gone through
// More splits must be worth their workspace.
constexpr double kWorthwhile = 0.98;

// Blocks of query rows that see a block of keys, by the window alone.
int64_t visits(Sizes const& p, BwdTile const& tile, int64_t left, int64_t right, int n_block) {
  int64_t const first_key = int64_t{n_block} * tile.block_n;
  int64_t const last_key = std::min<int64_t>(first_key + tile.block_n, p.seqlen_k) - 1;
  int64_t const first = right == kUnbounded ? 0 : std::max<int64_t>(first_key - right, 0);
  int64_t const last =
      left == kUnbounded ? p.seqlen_q - 1 : std::min<int64_t>(last_key + left, p.seqlen_q - 1);
  return last < first ? 0 : last / tile.block_m - first / tile.block_m + 1;
}

// Steps until the last CTA is done, if each of the `slots` (SMs, or clusters of them) takes the
// next in order as soon as it is free.
double makespan(TileOrder const& order, std::vector<int64_t> const& visits, double share,
                double fixed, std::size_t slots) {
  std::priority_queue<double, std::vector<double>, std::greater<>> free;
  double end = 0;
  for (int index = 0; index < order.num_tiles(); ++index) {
    double start = 0;
    if (free.size() == slots) {
      start = free.top();
      free.pop();
    }
    double const done = start + visits[order(index).block] * share + fixed;
    end = std::max(end, done);
    free.push(done);
  }
  return end;
}

}  // namespace

int bwd_splits(Sizes const& p, int kernel_head_dim, int64_t window_left, int64_t window_right,
               bool masked, bool in_turn) {
  if (p.num_heads_k == 0 || p.num_heads_q == 0 || kernel_head_dim == 0) return 0;
  BwdTile const tile = bwd_tile(kernel_head_dim);
  int const n_blocks = ceil_div(p.seqlen_k, tile.block_n);
  int64_t const tiles = int64_t{n_blocks} * p.num_heads_k * p.batch;
  int const group = p.num_heads_q / p.num_heads_k;
  int const partial = int64_t{group} * p.seqlen_q > kMostRowsOfSum ? 1 : 0;
  if (tiles == 0 || p.seqlen_q == 0) return 0;
  if (tiles > kMostTiles) return partial;  // they fill the GPU

  std::vector<int64_t> visited(n_blocks);
  for (int n = 0; n < n_blocks; ++n) {
    visited[n] = visits(p, tile, window_left, window_right, n);
  }
  int64_t const longest = group * *std::max_element(visited.begin(), visited.end());
  int const ctas = bwd_ctas_of_keys(kernel_head_dim);
  int const slots = kMostCtas / ctas;
  double const step =
      2. * tile.block_m * tile.block_n * (3 * p.head_dim + 2 * p.head_dim_v) / (kFlopsPerSm * ctas);
  double const partial_bytes =
      4. * p.batch * p.seqlen_k * p.num_heads_k * (p.head_dim + p.head_dim_v);
  auto const seconds = [&](int splits) {
    bool const sums = splits > 1 || partial;
    // As it is launched: where dQ has a kernel of its own, no CTA has to wait for its turn.
    TileOrder const order = bwd_order(p, kernel_head_dim, splits, masked, in_turn && tile.fused);
    double const compute = makespan(order, visited, static_cast<double>(group) / splits,
                                    kFixed + (sums ? kFixedOfPartial : 0), slots);
    double const sum = sums ? kLaunch + partial_bytes * (splits + 0.5) / kBytesPerSecond : 0;
    return compute * step + sum;
  };
  int best = 1;
  double best_seconds = seconds(1);
  // Heads first; then ranges of query rows, down to two steps.
  for (int splits = 2; splits <= kMostSplits && splits * 2 <= longest; ++splits) {
    bool const fair = splits <= group || splits % group == 0;
    if (!fair || splits * tiles > kMostTiles || (splits - 1) * tiles > 8 * slots) continue;
    double const time = seconds(splits);
    if (time < best_seconds * kWorthwhile) {
      best = splits;
      best_seconds = time;
    }
  }
  return best > 1 ? best : partial;
}

}  // namespace jax_fa3
