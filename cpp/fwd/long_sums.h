// Sums of O over very many keys.
//
// wgmma cuts off what does not fit as it adds, always towards 0: a sum of one sign over 1,048,576
// keys comes out 0.6 % low. So O is a sum over about kMostKeysOfSum keys at most; those of a longer
// tile are added up in fp32 in global memory, in a place that every CTA has for itself.
#pragma once

#include "common/softmax.h"
#include "fwd/params.h"
#include "fwd/traits.h"
#include "plan.h"

namespace jax_fa3::fwd {

// What the mainloop asks for; for keys that are not many it is nothing.
template <class Traits, bool kMany = Traits::kKeys == Keys::kMany>
struct LongSums {
  Params const& params;
  int warpgroup;
  int end;

  CUTLASS_DEVICE static int first_of_part(int first) { return first; }
  CUTLASS_DEVICE static bool is_complete(int) { return false; }
  template <class Out>
  CUTLASS_DEVICE static void put_away(Softmax const&, Out&) {}
  template <class Out>
  CUTLASS_DEVICE static void bring_back(Softmax const&, Out&) {}
};

template <class Traits>
struct LongSums<Traits, true> {
  static constexpr int kBlocks = kMostKeysOfSum / Traits::kBlockN;
  Params const& params;
  int warpgroup;
  int end;                    // of the tile's key blocks
  int begin = end - kBlocks;  // of the part at hand

  CUTLASS_DEVICE int first_of_part(int first) const { return max(first, begin); }
  CUTLASS_DEVICE bool is_complete(int n_block) const { return n_block < begin; }

  // Adds O to the sum and starts anew. Its first softmax is done, so O has a maximum.
  template <class Out>
  CUTLASS_DEVICE void put_away(Softmax const& softmax, Out& tOrO) {
    add(softmax, tOrO);
    float4* const sums = place<Out>();
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
  CUTLASS_DEVICE void bring_back(Softmax const& softmax, Out& tOrO) const {
    add(softmax, tOrO);
  }

 private:
  template <class Out>
  static constexpr int kVectors = decltype(size(Out{}))::value / 4;

  template <class Out>
  CUTLASS_DEVICE float4* place() const {
    constexpr int64_t kOfCta = long_sums_of_cta(Traits::kTile.block_m, Traits::kHeadDimV);
    return reinterpret_cast<float4*>(params.long_sums + blockIdx.x * kOfCta) +
           warpgroup * (kVectors<Out> + 1) * 128 + threadIdx.x % 128;
  }

  // What was put away, to O.
  template <class Out>
  CUTLASS_DEVICE void add(Softmax const& softmax, Out& tOrO) const {
    if (begin == end - kBlocks) return;
    float4 const* const sums = place<Out>();
    float4 const offsets = sums[kVectors<Out> * 128];
    float const weight[] = {exp2f(offsets.x - softmax.offset[0]),
                            exp2f(offsets.y - softmax.offset[1])};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVectors<Out>; ++i) {
      asm volatile("" ::: "memory");  // one after the other: there are no registers for more
      float4 const sum = sums[i * 128];
      tOrO(4 * i) += weight[0] * sum.x;
      tOrO(4 * i + 1) += weight[0] * sum.y;
      tOrO(4 * i + 2) += weight[1] * sum.z;
      tOrO(4 * i + 3) += weight[1] * sum.w;
    }
  }
};

}  // namespace jax_fa3::fwd
