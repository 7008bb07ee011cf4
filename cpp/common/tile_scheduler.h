// Which tile of the output a CTA works on next, and for which keys.
#pragma once

#include "common/mask.h"

namespace jax_fa3 {

struct TileCoord {
  int block;  // of query rows; of keys where a tile is one of dK and dV, or of V transposed
  int head;   // query head; KV head where a tile is of keys
  int batch;
};

// What a CTA works on: a tile of query rows, and the key blocks that it goes through for it: all
// that the tile's rows see, or where several CTAs share the tile this one's part (fwd/parts.h).
struct WorkTile {
  TileCoord tile;
  BlockRange blocks;
  bool last;  // there is no tile: a persistent CTA is done
};

// A fixed order of all tiles: heads in sections whose K and V share the L2 cache; within a section
// the last block first, or the first one if `ascending`. Under a causal mask the longest tiles are
// those of the last query rows and of the first keys: they start first. (Deterministic gradients
// want the last keys first, see bwd/write_dq.h.)
struct TileOrder {
  int num_blocks;
  int num_heads;
  int batch;
  int section;  // heads of one section, counted over (batch, head)
  bool ascending = false;
  bool short_last = false;  // the last block's tiles take less time: they come after all others

  JAX_FA3_HOST_DEVICE int num_tiles() const { return num_blocks * num_heads * batch; }

  JAX_FA3_HOST_DEVICE TileCoord operator()(int index) const {
    int const rows = num_heads * batch;
    int const blocks = short_last ? num_blocks - 1 : num_blocks;
    if (index >= blocks * rows) {
      int const row = index - blocks * rows;
      return {blocks, row % num_heads, row / num_heads};
    }
    int const first = index / (blocks * section) * section;
    int const width = rows - first < section ? rows - first : section;
    int const rest = index - first * blocks;
    int const row = first + rest % width;
    int const block = rest / width;
    return {ascending ? block : blocks - 1 - block, row % num_heads, row / num_heads};
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
