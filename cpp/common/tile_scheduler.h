// Which tile of the output a CTA works on next.
#pragma once

#include "common/mask.h"

namespace jax_fa3 {

struct TileCoord {
  int m_block;
  int head;
  int batch;
};

// A fixed order of all tiles: heads in sections whose K and V share the L2 cache; within a section
// the last rows first (or the first, where tiles are of keys), so that under a causal mask the
// longest tiles start first. Keys that add in turn (bwd/write_dq.h) have the last first, too.
struct TileOrder {
  int num_m_blocks;
  int num_heads;
  int batch;
  int section;  // heads of one section, counted over (batch, head)
  bool ascending = false;
  bool short_last =
      false;  // the tiles of the last rows, which take less time, come after all others

  JAX_FA3_HOST_DEVICE int num_tiles() const { return num_m_blocks * num_heads * batch; }

  JAX_FA3_HOST_DEVICE TileCoord operator()(int index) const {
    int const rows = num_heads * batch;
    int const blocks = short_last ? num_m_blocks - 1 : num_m_blocks;
    if (index >= blocks * rows) {
      int const row = index - blocks * rows;
      return {blocks, row % num_heads, row / num_heads};
    }
    int const first = index / (blocks * section) * section;
    int const width = rows - first < section ? rows - first : section;
    int const rest = index - first * blocks;
    int const row = first + rest % width;
    int const m_block = rest / width;
    return {ascending ? m_block : blocks - 1 - m_block, row % num_heads, row / num_heads};
  }
};

// Tiles of equal length are dealt out in fixed rounds, one to each CTA. Odd rounds run backwards:
// where they are not quite equal, a CTA that got the longest of one round gets the shortest of the
// next.
JAX_FA3_HOST_DEVICE int tile_of_round(int round, int cta, int num_ctas) {
  return round * num_ctas + (round & 1 ? num_ctas - 1 - cta : cta);
}

#ifdef __CUDACC__
// The index of this CTA's next tile; the whole warp calls it. With a counter, whoever is free takes
// the next one.
__device__ __forceinline__ int next_tile(int round, int cta, int num_ctas, int* counter) {
  if (counter == nullptr) return tile_of_round(round, cta, num_ctas);
  if (round == 0) return cta;
  int taken = 0;
  if (threadIdx.x % 32 == 0) taken = atomicAdd(counter, 1);
  return num_ctas + __shfl_sync(~0u, taken, 0);
}
#endif

}  // namespace jax_fa3
