// Division by a number that the host knows: a multiplication. (A division is twenty instructions,
// and code that runs once waits for each.)
#pragma once

#include <cstdint>

#include "common/mask.h"

namespace jax_fa3::decode {

struct Divider {
  int divisor = 1;
  uint32_t multiplier = uint32_t{1} << 31;  // 2^shift / divisor, rounded up
  int shift = 31;

  Divider() = default;
  explicit Divider(int divisor) : divisor(divisor) {
    while (int64_t{1} << (shift - 31) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }

  // Exact for 0 <= x < 2^31: what the multiplier is too large by is less than 1 / x of it.
  JAX_FA3_HOST_DEVICE int operator()(int x) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(x)} * multiplier >> shift);
  }
  JAX_FA3_HOST_DEVICE int rest(int x) const { return x - (*this)(x)*divisor; }
};

}  // namespace jax_fa3::decode
