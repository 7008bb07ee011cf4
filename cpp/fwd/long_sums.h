// Sums of O over very many keys.
//
// As wgmma adds, it cuts off what does not fit into its accumulator, always towards 0: a sum of one
// sign over 1,048,576 keys comes out 0.6 % low. So the accumulators hold partial results over about
// kMostKeysOfSum keys at most. Those of a longer tile are accumulated in fp32 in global memory,
// where every CTA has room of its own.
#pragma once

#include "common/softmax.h"
#include "fwd/params.h"
#include "fwd/traits.h"
#include "plan.h"

namespace jax_fa3::fwd {

// What the mainloop calls. With fewer keys than that (kMany is false) there is nothing to do.
template <class Traits, bool kMany = Traits::kKind == Kind::kMany>
struct LongSums {
  Params const& params;
  int warpgroup;
  int end;

  CUTLASS_DEVICE static int first_block(int first) { return first; }
  CUTLASS_DEVICE static bool is_full(int) { return false; }
  template <class Out>
  CUTLASS_DEVICE static void accumulate(Softmax const&, Out&) {}
  template <class Out>
  CUTLASS_DEVICE static void finish(Softmax const&, Out&) {}
};

template <class Traits>
struct LongSums<Traits, true> {
  static constexpr int kBlocks = kMostKeysOfSum / Traits::kBlockN;
  Params const& params;
  int warpgroup;
  int end;                    // of the tile's key blocks
  int begin = end - kBlocks;  // of those that the accumulators sum over

  CUTLASS_DEVICE int first_block(int first) const { return max(first, begin); }
  CUTLASS_DEVICE bool is_full(int n_block) const { return n_block < begin; }

  // Adds O to the sum in memory, which then counts from the maxima of now, and clears O. At least
  // one block has been through the softmax, so there are maxima.
  template <class Out>
  CUTLASS_DEVICE void accumulate(Softmax const& softmax, Out& tOrO) {
    add(softmax, tOrO);
    float4* const sums = room<Out>();
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVectors<Out>; ++i) {
      asm volatile("" ::: "memory");
      sums[i * 128] = float4{tOrO(4 * i), tOrO(4 * i + 1), tOrO(4 * i + 2), tOrO(4 * i + 3)};
    }
    sums[kVectors<Out> * 128] = float4{softmax.offset[0], softmax.offset[1], 0.f, 0.f};
    begin -= kBlocks;
    cute::clear(tOrO);
  }

  template <class Out>
  CUTLASS_DEVICE void finish(Softmax const& softmax, Out& tOrO) const {
    add(softmax, tOrO);
  }

 private:
  template <class Out>
  static constexpr int kVectors = decltype(size(Out{}))::value / 4;

  // The thread's elements of the CTA's room: all threads' first 16 bytes, then their next; last the
  // offsets of its two rows.
  template <class Out>
  CUTLASS_DEVICE float4* room() const {
    constexpr int64_t kOfCta = long_sums_of_cta(Traits::kTile.block_m, Traits::kHeadDimV);
    return reinterpret_cast<float4*>(params.long_sums + blockIdx.x * kOfCta) +
           warpgroup * (kVectors<Out> + 1) * 128 + threadIdx.x % 128;
  }

  // Adds the sum in memory to O.
  template <class Out>
  CUTLASS_DEVICE void add(Softmax const& softmax, Out& tOrO) const {
    if (begin == end - kBlocks) return;
    float4 const* const sums = room<Out>();
    float4 const offsets = sums[kVectors<Out> * 128];
    float const weight[] = {exp2f(offsets.x - softmax.offset[0]),
                            exp2f(offsets.y - softmax.offset[1])};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVectors<Out>; ++i) {
      asm volatile(
          "" ::
              : "memory");  // keeps the loads in order: there are no registers for more at a time
      float4 const sum = sums[i * 128];
      tOrO(4 * i) += weight[0] * sum.x;
      tOrO(4 * i + 1) += weight[0] * sum.y;
      tOrO(4 * i + 2) += weight[1] * sum.z;
      tOrO(4 * i + 3) += weight[1] * sum.w;
    }
  }
};

}  // namespace jax_fa3::fwd
