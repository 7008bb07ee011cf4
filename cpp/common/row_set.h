// Some of the rows of a tile, of which there are 128 at most: one bit each.
#pragma once

#include <cstdint>

#include "common/mask.h"

namespace jax_fa3 {

struct RowSet {
  static constexpr int kMasks = 4;
  uint32_t bits[kMasks];  // of 32 rows each

  // The rows from `first` on, of a tile of so many: whole masks.
  JAX_FA3_HOST_DEVICE static RowSet from(int first, int rows = kMasks * 32) {
    RowSet set;
    for (int i = 0; i < kMasks; ++i) {
      int const bit = first - i * 32;
      set.bits[i] = i * 32 >= rows || bit >= 32 ? 0u : (bit <= 0 ? ~0u : ~0u << bit);
    }
    return set;
  }
  JAX_FA3_HOST_DEVICE bool any() const { return (bits[0] | bits[1] | bits[2] | bits[3]) != 0; }
  JAX_FA3_HOST_DEVICE bool contains(int row) const { return bits[row / 32] >> row % 32 & 1; }
};

}  // namespace jax_fa3
