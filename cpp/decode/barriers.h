// The decoding kernel's named barriers (bar.sync).
#pragma once

#include <cutlass/arch/barrier.h>

namespace jax_fa3::decode {

// Each has one purpose. CUTLASS adds 8 to a number that is passed to it: barriers 0 to 7 are its.
enum class NamedBarrier : uint32_t {
  kValuesZeroed0,  // a warpgroup's threads have zeroed what no row of the tile sees
  kValuesZeroed1,
  kPartsStored,  // all consumers have stored their rows of a part of a tile, or know who is the
                 // last
  kCanLoad,      // of the kernel of clusters: barriers are there for the loading warp,
  kStarted,      // and for the others
  kWarpsMet,     // a tile's warps are all done with it, or have all left their O of a part in
                 // shared memory
};

CUTLASS_DEVICE uint32_t barrier_id(NamedBarrier first, int offset) {
  return static_cast<uint32_t>(first) + offset;
}

}  // namespace jax_fa3::decode
