// Sums of O over many keys in shared memory (kPromoteInSmem, traits.h). Each thread has its part
// there as it has it in registers: no other thread reads it.
#pragma once

#include "common/tma.h"
#include "fp8/warpgroup_mma.h"

namespace jax_fa3::fp8 {

// An accumulator of O is relative to 2^(row maximum) and to out_unit. This is log2 of their
// product.
inline __device__ float out_log2(Softmax const& softmax, int row) {
  return softmax.row_max[row] + log2f(softmax.out_unit);
}

// Adds the promoted sum to O, in O's scale of today.
template <class Traits, class Out>
__device__ void add_promoted(typename Traits::SharedStorage& storage, int warpgroup,
                             Softmax const& softmax, Out& tOrO) {
  float4 const* const sums = storage.promoted(warpgroup) + thread_index() % 128;
  float2 const sums_log2 = storage.promoted_log2[thread_index() - 128];
  float const rescale[] = {exp2f(sums_log2.x - out_log2(softmax, 0)),
                           exp2f(sums_log2.y - out_log2(softmax, 1))};
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(tOrO); i += 4) {
    float4 const sum = sums[i / 4 * 128];
    tOrO(i) += sum.x * rescale[0];
    tOrO(i + 1) += sum.y * rescale[0];
    tOrO(i + 2) += sum.z * rescale[1];
    tOrO(i + 3) += sum.w * rescale[1];
  }
}

// Adds O to the promoted sum and clears it. `promoted`: whether there is a sum already.
template <class Traits, class Out>
__device__ void promote_out(typename Traits::SharedStorage& storage, int warpgroup,
                            Softmax const& softmax, Out& tOrO, bool& promoted) {
  if (promoted) {
    add_promoted<Traits>(storage, warpgroup, softmax, tOrO);
  } else {  // TMA may still be reading the output of the previous tile, which is in this memory
    if (threadIdx.x % 128 == 0) tma_store_wait<0>();
    cutlass::arch::NamedBarrier::sync(128, barrier_id(NamedBarrier::kOutOfWarpgroup0, warpgroup));
  }
  float4* const sums = storage.promoted(warpgroup) + thread_index() % 128;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(tOrO); i += 4) {
    sums[i / 4 * 128] = float4{tOrO(i), tOrO(i + 1), tOrO(i + 2), tOrO(i + 3)};
  }
  clear(tOrO);
  storage.promoted_log2[thread_index() - 128] = float2{out_log2(softmax, 0), out_log2(softmax, 1)};
  promoted = true;
}

}  // namespace jax_fa3::fp8
