// Shape of the machine code of one FP8 forward kernel.
#pragma once

#include "fp8/fp8.h"
#include "fp8/softmax.h"
#include "fwd/traits.h"

namespace jax_fa3::fp8 {

using namespace cute;

struct Params : fwd::Params {  // value is V^T: [b, k, v, s], keys in the order of transpose.h
  float const* query_scale;    // [b, t / kBlock, n]
  float const* key_scale;      // [b, s / kBlock, k]
  float const* value_scale;    // [b, s / kBlock, k]
  int num_query_blocks, num_key_blocks, num_heads_k;
  bool out_fp16;
};

template <int kHeadDim_>
struct Traits {
  using Params = fp8::Params;
  using Softmax = fp8::Softmax;
  using Element = cutlass::float_e4m3_t;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDim_;
  // Where the registers suffice, S of a step is computed beside P V of the one before. A narrow O
  // leaves them to a third warpgroup instead, each of whose GEMMs waits for the last.
  static constexpr int kConsumerWarpgroups = kHeadDim <= 64 ? 3 : 2;
  static constexpr bool kBesideOut = kConsumerWarpgroups == 2;
  static constexpr bool kPingPong = false;  // no gain (README.md)
  static constexpr int kBlockM = 64 * kConsumerWarpgroups;
  static constexpr int kBlockN = kBlock;  // a step has one scale, and so has a warpgroup's Q
  static constexpr bool kOutOverValue = false;
  static constexpr int kStages = kHeadDim <= 128 ? 4 : 2;  // of K and the V of the block after it
  static constexpr int kWorkStages = 1;
  // wgmma adds 8-bit products with few bits more than they have: what a step adds to O is summed by
  // itself and added to O in fp32, where the registers suffice.
  static constexpr bool kTwoLevels = kHeadDim <= 128;

  static constexpr int kConsumerThreads = kConsumerWarpgroups * 128;
  static constexpr int kThreads = 128 + kConsumerThreads;
  static constexpr int kProducerRegisters = kConsumerWarpgroups == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumerWarpgroups == 3 ? 160 : 240;

  static constexpr int kSlab = slab8(kHeadDim);
  static constexpr int kSlabV = slab(kHeadDim);  // of the output, 16 bits

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

  template <class Fragment>
  CUTLASS_DEVICE static auto packed_out(Params const& params, Fragment const& tOrO) {
    return params.out_fp16 ? packed<cutlass::half_t>(tOrO) : packed<cutlass::bfloat16_t>(tOrO);
  }

  static constexpr int kSizeQ = kBlockM * kHeadDim;
  static constexpr int kSizeK = kBlockN * kHeadDim;  // of one stage; and of V

  struct ConsumerState {  // positions, kept from tile to tile
    PipelineState<kStages> step;
    PipelineState<kWorkStages> work;
    uint32_t query_phase = 0;
  };

  struct SharedStorage {
    alignas(1024) uint8_t query[kSizeQ];
    alignas(1024) uint8_t key[kStages * kSizeK];
    alignas(1024) uint8_t value[kStages * kSizeK];
    alignas(1024) uint16_t own_out[kBlockM * kHeadDim];
    FullBarrier query_full[kConsumerWarpgroups];
    EmptyBarrier query_empty[kConsumerWarpgroups];
    Pipeline<kStages> step_pipeline;  // K of a block, and V of the one after it
    Pipeline<kWorkStages> work_pipeline;
    fwd::Work work[kWorkStages];

    CUTLASS_DEVICE void init_barriers() {
      constexpr int kConsumerWarps = kConsumerWarpgroups * 4;
      for (int warpgroup = 0; warpgroup < kConsumerWarpgroups; ++warpgroup) {
        query_full[warpgroup].init(1);
        query_empty[warpgroup].init(4);
      }
      step_pipeline.init(kConsumerWarps);
      work_pipeline.init(kConsumerWarps + 1);  // and the loading warp
      cutlass::arch::fence_barrier_init();
    }

    CUTLASS_DEVICE uint16_t* out() { return own_out; }
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace jax_fa3::fp8
