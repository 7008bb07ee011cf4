// Some of the rows of a tile.
#pragma once

#include <cstdint>

#include "common/mask.h"

namespace jax_fa3 {

struct RowSet {
  static constexpr int kWords = 4;
  uint32_t words[kWords];  // of 32 rows each

  // The rows from `first` on.
  JAX_FA3_HOST_DEVICE static RowSet from(int first) {
    RowSet set;
    for (int i = 0; i < kWords; ++i) {
      int const bit = first - i * 32;
      set.words[i] = bit <= 0 ? ~0u : (bit >= 32 ? 0u : ~0u << bit);
    }
    return set;
  }
  JAX_FA3_HOST_DEVICE bool any() const { return (words[0] | words[1] | words[2] | words[3]) != 0; }
  JAX_FA3_HOST_DEVICE bool contains(int row) const { return words[row / 32] >> row % 32 & 1; }
};

}  // namespace jax_fa3
