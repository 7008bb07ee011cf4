// The order of the forward's tiles.
#pragma once

#include <algorithm>

#include "common/tile_scheduler.h"
#include "plan.h"

namespace jax_fa3::fwd {

// As TileOrder; but the first heads are in smaller sections than the last ones. Small ones find
// more of K and V in the L2 cache. Only the last section's end matters to whether all CTAs end
// together, for which it must have many tiles.
struct Order : TileOrder {
  int early_section = 0;
  int early_heads = 0;  // whole early sections

  JAX_FA3_HOST_DEVICE TileCoord operator()(int index) const {
    if (short_last) return TileOrder::operator()(index);
    bool const early = index < early_heads * num_blocks;
    int const most = early ? early_section : section;
    int const origin = early ? 0 : early_heads;
    int const end = early ? early_heads : num_heads * batch;
    int const first = origin + (index - origin * num_blocks) / (num_blocks * most) * most;
    int const width = end - first < most ? end - first : most;
    int const rest = index - first * num_blocks;
    int const row = first + rest % width;
    return {num_blocks - 1 - rest / width, row % num_heads, row / num_heads};
  }

  // All heads but those of the last section in sections of kParts-th its size, of whole groups of
  // query heads that share a KV head. Not of one KV head alone with tiles for just some of the
  // CTAs: they would run beside those of the next.
  void make_early(int group) {
    constexpr int kParts = 8;
    early_section = std::max(section / group / kParts, 1) * group;
    if (early_section == group && int64_t{early_section} * num_blocks < kMostCtas) return;
    early_heads = std::max(num_heads * batch - section, 0) / early_section * early_section;
    section = num_heads * batch - early_heads;
  }
};

}  // namespace jax_fa3::fwd
