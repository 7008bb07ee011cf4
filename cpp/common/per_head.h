// Operands of a call that are one fp32 number for each query head. They stand in one list: the
// arrays of the custom calls (ffi_targets.h), Problem and the kernels' Params have what is in it.
#pragma once

#include <cstdint>

// [1 or b, n] each, or null:
// - sinks: a score, in base e, of one more key, whose value is 0. Rows that see a key see it, too.
// - alibi_slopes: by it the scores, in base e, rise from key to key; at the key of the row's own
//   index nothing is added.
// X(name, ...) for each.
#define JAX_FA3_PER_HEAD(X, ...) \
  X(sinks, __VA_ARGS__)          \
  X(alibi_slopes, __VA_ARGS__)

namespace jax_fa3 {

struct PerHead {
  float const* data;  // or null: none
  int batch_stride;   // 0: the same for all batch entries

  bool exists() const { return data != nullptr; }
#ifdef __CUDACC__
  __device__ __forceinline__ float operator()(int batch, int head) const {
    return __ldg(data + int64_t{batch} * batch_stride + head);
  }
#endif
};

#define JAX_FA3_FIELD(name, ...) PerHead name;
struct HeadOperands {
  JAX_FA3_PER_HEAD(JAX_FA3_FIELD)
};
#undef JAX_FA3_FIELD

}  // namespace jax_fa3
