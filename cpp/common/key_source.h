// Where the producer finds a block of keys.
#pragma once

#include "common/tma.h"

namespace jax_fa3 {

// The keys of one KV head of one batch entry, in blocks of kBlockN rows of K or V: (batch, head,
// block) -> the coordinates that TMA loads from. Here they are rows of one [b, s, k, h] array, one
// after the other; keys that lie in pages need another struct with the same member.
struct KeySource {
  int batch;
  int head_k;

  template <int kBlockN>
  CUTLASS_DEVICE RowCoord block(int n_block) const {
    return {n_block * kBlockN, head_k, batch};
  }
};

}  // namespace jax_fa3
