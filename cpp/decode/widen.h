// An e4m3 cache: the producer warpgroup's other two warps widen its blocks to 16 bits, exactly,
// from the ring that TMA fills to the one that consumers read, and pass on the scales of the
// positions.
#pragma once

#include "common/tma.h"
#include "decode/params.h"
#include "decode/traits.h"

namespace jax_fa3::decode {

// Two e4m3 numbers, exactly: both 16-bit formats have them all.
template <class Element>
CUTLASS_DEVICE uint32_t widened(uint32_t word, int half) {
  uint32_t pair;
  auto const bits = static_cast<uint16_t>(half == 0 ? word : word >> 16);
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(bits));
  if constexpr (std::is_same_v<Element, cutlass::half_t>) return pair;
  return pack<Element>(unpack<cutlass::half_t>(pair, 0), unpack<cutlass::half_t>(pair, 1));
}

// A block [kRows, kColumns], row after row, to slabs as wgmma reads them.
template <class Traits, int kColumns>
CUTLASS_DEVICE void widen_block(uint8_t const* from, uint16_t* to) {
  using Element = typename Traits::Element;
  constexpr int kVectors = kColumns / 8;                                  // of a row
  constexpr int kCount = Traits::kBlockN * kVectors / Traits::kWideners;  // of a thread
  // So many are read before any is written: a read may not overtake a write, which may be to the
  // same place for all that the compiler knows.
  constexpr int kAtOnce = kCount % 8 == 0 ? 8 : 4;
  static_assert(kCount % kAtOnce == 0);
  auto const* const source = reinterpret_cast<uint2 const*>(from);
  auto* const target = reinterpret_cast<uint4*>(to);
  int const thread = threadIdx.x % Traits::kWideners;
  CUTLASS_PRAGMA_UNROLL
  for (int first = 0; first < kCount; first += kAtOnce) {
    uint2 x[kAtOnce];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) x[i] = source[(first + i) * Traits::kWideners + thread];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      int const vector = (first + i) * Traits::kWideners + thread;
      target[swizzled_vector<Traits::kBlockN, slab(kColumns)>(vector / kVectors,
                                                              vector % kVectors)] =
          uint4{widened<Element>(x[i].x, 0), widened<Element>(x[i].x, 1),
                widened<Element>(x[i].y, 0), widened<Element>(x[i].y, 1)};
    }
  }
}

template <class Traits>
CUTLASS_DEVICE void widen(typename Traits::SharedStorage& storage) {
  bool const elected = threadIdx.x % 32 == 0;
  PipelineState<Traits::kWorkStages> work_state;
  PipelineState<Traits::kLoadStages> from;
  PipelineState<Traits::kStages> to;
  PipelineState<Traits::kScaleStages> scales;
  auto const widen_next = [&](auto columns, auto const& also) {
    storage.loads.pipeline.full[from.stage].wait(from.phase);
    storage.pipeline.empty[to.stage].wait(to.phase ^ 1);
    widen_block<Traits, decltype(columns)::value>(storage.loads.ring[from.stage],
                                                  storage.ring[to.stage]);
    also();
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (elected) {
      storage.loads.pipeline.empty[from.stage].arrive();
      storage.pipeline.full[to.stage].arrive();
    }
    from.advance();
    to.advance();
  };
  for (;; work_state.advance()) {
    storage.work_pipeline.full[work_state.stage].wait(work_state.phase);
    Work const& work = storage.work[work_state.stage];
    if (work.last) return;
    int const blocks = work.end - work.begin;
    __syncwarp();
    if (elected) storage.work_pipeline.empty[work_state.stage].arrive();
    for (int i = 0; i < blocks; ++i) {
      // The scales of both come with the keys: probabilities are multiplied by the values' before
      // the values are waited for. Their place has been free for long when the keys' is: the ring
      // holds fewer blocks than there are places.
      widen_next(Int<Traits::kHeadDim>{}, [&] {
        constexpr int kCount = 2 * Traits::kBlockN;
        for (int j = threadIdx.x % Traits::kWideners; j < kCount; j += Traits::kWideners) {
          storage.loads.scales_out[scales.stage][j] = storage.loads.scales[from.stage][j];
        }
      });
      scales.advance();
      widen_next(Int<Traits::kHeadDimV>{}, [] {});
    }
  }
}

}  // namespace jax_fa3::decode
