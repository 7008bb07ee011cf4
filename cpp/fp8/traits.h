// Shape of the machine code of one FP8 forward kernel.
#pragma once

#include "fp8/fp8.h"
#include "fp8/softmax.h"
#include "fp8/transpose.h"
#include "fwd/traits.h"

namespace jax_fa3::fp8 {

using namespace cute;

struct Params : fwd::Params {  // value is V^T: [b, k, v, s], keys in the order of transpose.h
  Transpose transpose;         // what makes it
  float const* query_scale;    // [b, t / kBlock, n]
  float const* key_scale;      // [b, s / kBlock, k]
  float const* value_scale;    // [b, s / kBlock, k]
  int num_query_blocks, num_key_blocks, num_heads_k;
  bool out_fp16;
};

// What a step needs to know of its block of keys.
struct BlockScale {
  float key;
  float unit;      // of O
  float ratio;     // the unit at the block behind, in this one
  float exponent;  // of base 2: the value scale in that unit
};

template <int kHeadDim_>
struct Traits {
  using Params = fp8::Params;
  using Softmax = fp8::Softmax;
  using Element = cutlass::float_e4m3_t;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDim_;
  // Three warpgroups hide each other's waits: each computes P V, then S, then the softmax. A wide O
  // leaves registers for two; they compute S of a step beside P V of the one before.
  static constexpr int kConsumerWarpgroups = kHeadDim <= 128 ? 3 : 2;
  static constexpr bool kBesideOut = kConsumerWarpgroups == 2;
  static constexpr bool kPingPong = false;  // no gain (README.md)
  static constexpr int kBlockM = 64 * kConsumerWarpgroups;
  static constexpr int kBlockN = kBlock;  // a step has one scale, and so has a warpgroup's Q
  static constexpr bool kOutOverValue = false;
  static constexpr bool kAccumulates = false;  // a ring's steps are in 16 bits
  static constexpr bool kHasLseLow = false;
  static constexpr int kStages = kHeadDim <= 64 ? 4 : kHeadDim <= 128 ? 3 : 2;  // of K and V
  static constexpr int kWorkStages = 2;  // of a tile, until its output is stored, and of the next
  // query_full completes once for every tile, also for one without blocks.
  CUTLASS_DEVICE static constexpr uint32_t query_phase(int work_stage) { return work_stage; }
  static_assert(kWorkStages == 2);

  // wgmma adds 8-bit products with few bits more than they have, so a long sum must not be left to
  // it. What a step adds to O is summed by itself and added in fp32, where the registers suffice;
  // or every 32 steps O is added to a sum in shared memory, where that suffices.
  static constexpr bool kSumInRegisters = kHeadDim <= 64;
  static constexpr bool kSumInMemory = kHeadDim == 128;
  static constexpr int kStepsOfSum = 32;
  static_assert(!kSumInRegisters || !kBesideOut, "update_max() overwrites what O is rescaled by");
  static constexpr bool kBlocksByWarpgroup =
      true;  // a warpgroup leaves out what its rows do not see

  static constexpr int kConsumerThreads = kConsumerWarpgroups * 128;
  static constexpr int kThreads = 128 + kConsumerThreads;
  static constexpr int kProducerRegisters = kConsumerWarpgroups == 3 ? 32 : 24;
  static constexpr bool kTransposesBeside = kProducerRegisters > 24;  // which would spill
  static constexpr int kConsumerRegisters = kConsumerWarpgroups == 3 ? 160 : 240;

  static constexpr int kSlab = slab8(kHeadDim);
  static constexpr int kSlabV = slab(kHeadDim);  // of the output, 16 bits
  static constexpr int kOutRows = 64;            // a warpgroup's part is contiguous

  using Warpgroups = Layout<Shape<Int<kConsumerWarpgroups>, _1, _1>>;
  using MmaQK = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kBlockN>, Int<kHeadDim>>>(),
      Warpgroups{}));
  using MmaPV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kHeadDim>, Int<kBlockN>>>(),
      Warpgroups{}));
  static_assert(tile_size<1>(MmaQK{}) == kBlockN && tile_size<1>(MmaPV{}) == kHeadDim);

  using LayoutQ = LayoutRows8<kBlockM, kHeadDim, 1>;
  using LayoutK = LayoutRows8<kBlockN, kHeadDim, kStages>;
  using LayoutVt = LayoutRows8<kHeadDim, kBlockN, kStages>;

  // Calls visit() with an element of the output, of 16 bits.
  template <class Visit>
  CUTLASS_DEVICE static void visit_out_element(Params const& params, Visit const& visit) {
    params.out_fp16 ? visit(cutlass::half_t{}) : visit(cutlass::bfloat16_t{});
  }

  static constexpr int kSizeQ = kBlockM * kHeadDim;
  static constexpr int kSizeK = kBlockN * kHeadDim;                        // of one stage; and of V
  static constexpr int kSizeOut = 64 * kHeadDim * (kSumInMemory ? 4 : 2);  // bytes, of a warpgroup

  struct SharedStorage {
    alignas(1024) uint8_t query[kSizeQ];
    alignas(1024) uint8_t key[kStages * kSizeK];
    alignas(1024) uint8_t value[kStages * kSizeK];
    alignas(1024) uint8_t own_out[kConsumerWarpgroups * kSizeOut];
    FullBarrier query_full[kConsumerWarpgroups];
    EmptyBarrier query_empty[kConsumerWarpgroups];
    Pipeline<kStages> step_pipeline;  // K of a block, and V of the one after it
    Pipeline<kWorkStages> work_pipeline;
    WorkTile work[kWorkStages];
    // Those of the tile's blocks that a warpgroup's 64 rows see.
    BlockRange warpgroup_blocks[kWorkStages][kConsumerWarpgroups];
    BlockScale scale[kStages];  // of the block whose K is in the stage
    float2 sums_exponent[kSumInMemory ? kConsumerThreads : 1];

    CUTLASS_DEVICE void init_barriers() {
      constexpr int kConsumerWarps = kConsumerWarpgroups * 4;
      init_query_barriers(query_full, query_empty);
      step_pipeline.init(kConsumerWarps);
      work_pipeline.init(kConsumerWarps + 1);  // and the loading warp
      cutlass::arch::fence_barrier_init();
    }

    // A warpgroup's output, and before it its sums (kSumInMemory).
    CUTLASS_DEVICE uint16_t* out(int warpgroup) {
      return reinterpret_cast<uint16_t*>(own_out + warpgroup * kSizeOut);
    }
    CUTLASS_DEVICE float4* sums(int warpgroup) {
      return reinterpret_cast<float4*>(own_out + warpgroup * kSizeOut);
    }
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace jax_fa3::fp8
