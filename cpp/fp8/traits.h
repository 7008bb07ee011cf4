// Shape of the machine code of one FP8 forward kernel.
#pragma once

#include "fp8/fp8.h"
#include "fp8/softmax.h"
#include "fp8/transpose.h"
#include "fwd/traits.h"

namespace jax_fa3::fp8 {

using namespace cute;

// The inherited `value` describes V^T, [b, k, v, s], its keys in the order of transpose.h.
struct Params : fwd::Params {
  Transpose transpose;                                // V to V^T
  float const* query_scale;                           // [b, ceil(t / kBlock), n]
  float const* key_scale;                             // [b, ceil(s / kBlock), k]
  float const* value_scale;                           // [b, ceil(s / kBlock), k]
  float const* value_mean;                            // [b, k, v], or null
  int num_query_blocks, num_key_blocks, num_heads_k;  // blocks of kBlock rows
  bool out_fp16;                                      // else bf16, if out_fp32 is null
};

// The scales of what a step reads, as the consumers use them.
struct StepScale {
  float key;    // of block n's K
  float value;  // of block n + 1's V, divided by kOutScale
};

template <int kHeadDim_>
struct Traits {
  using Params = fp8::Params;
  using Softmax = fp8::Softmax;
  using Element = cutlass::float_e4m3_t;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDim_;
  // A warpgroup waits for P V of block n + 1 before it issues S of block n (they share registers)
  // and for that before its softmax: the tensor cores work for the others meanwhile. At head dim
  // 256 O leaves registers for two only.
  static constexpr int kConsumerWarpgroups = kHeadDim <= 128 ? 3 : 2;
  static constexpr bool kHasBits = false;
  static constexpr bool kPingPong = false;  // no gain (docs/kernel_notes/fp8.md)
  static constexpr int kBlockM = 64 * kConsumerWarpgroups;
  // One scale for the K and one for the V of a step. A warpgroup's 64 rows of Q have one, too.
  static constexpr int kBlockN = kBlock;
  static constexpr bool kOutOverValue = false;
  static constexpr bool kAccumulates = false;  // a ring's steps are in 16 bits
  static constexpr bool kHasLseLow = false;
  static constexpr int kStages = kHeadDim <= 128 ? 4 : 2;  // of K and V
  // A tile's work slot is read until its output is stored; the next tile's first S is issued
  // before.
  static constexpr int kWorkStages = 2;
  // Of query_full: it completes once per tile, also for a tile that visits no block, and tiles take
  // the two work slots in turn. So the slot is the parity of the tile's number.
  CUTLASS_DEVICE static constexpr uint32_t query_phase(int work_stage) { return work_stage; }
  static_assert(kWorkStages == 2);

  // FP8 wgmma cuts each product and the sum so far off 13 bits behind the leading bit of the
  // largest of them: over many keys O would lose what lies below. So P V of a step is summed from
  // 0, in the registers that S leaves free while P is in e4m3, and added to O by FFMA, which
  // multiplies by V's scale: so many columns at a time.
  static constexpr int kPartColumns = kHeadDim < kBlockN ? kHeadDim : kBlockN;
  // Whether the tensor cores sum P's rows, too, as it is in e4m3, which spares an FADD for each: a
  // gain at these head dims (docs/kernel_notes/fp8.md).
  static constexpr bool kSumsByMma = kHeadDim <= 128;
  // A warpgroup leaves out blocks of the tile that its own 64 rows do not see.
  static constexpr bool kBlocksByWarpgroup = true;

  static constexpr bool kSharesKeys = false;
  static constexpr int kCtasPerSm = 1;
  static constexpr int kConsumerThreads = kConsumerWarpgroups * 128;
  static constexpr int kThreads = 128 + kConsumerThreads;
  static constexpr int kProducerRegisters = kConsumerWarpgroups == 3 ? 32 : 24;
  // Whether there is code for the producer's spare warps to transpose V (transpose.h): it takes
  // more than 24 registers.
  static constexpr bool kTransposesInKernel = kProducerRegisters > 24;
  static constexpr int kConsumerRegisters = kConsumerWarpgroups == 3 ? 160 : 240;

  static constexpr int kSlab = slab8(kHeadDim);
  static constexpr int kSlabV = slab(kHeadDim);  // of the output, 16 bits
  static constexpr int kOutRows = 64;            // of a slab: each warpgroup has its own slabs

  using Warpgroups = Layout<Shape<Int<kConsumerWarpgroups>, _1, _1>>;
  using MmaQK = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kBlockN>, Int<kHeadDim>>>(),
      Warpgroups{}));
  using MmaPV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kPartColumns>, Int<kBlockN>>>(),
      Warpgroups{}));
  static_assert(tile_size<1>(MmaQK{}) == kBlockN && tile_size<1>(MmaPV{}) == kPartColumns);

  // P's sums are P times this operand, the same for each 32 keys: column n of 8 takes every eighth
  // key, from n on. So few numbers are in one sum, and little of it is cut off.
  static constexpr int kSumColumns = 8;
  static constexpr int kSumKeys = 32;
  static constexpr int kSizeOnes = kSumColumns * kSumKeys;
  using MmaSum = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kSumColumns>, Int<kSumKeys>>>(),
      Warpgroups{}));
  using LayoutOnes = decltype(tile_to_shape(GMMA::Layout_K_INTER_Atom<uint8_t>{},
                                            Shape<Int<kSumColumns>, Int<kSumKeys>>{}));

  using LayoutQ = LayoutRows8<kBlockM, kHeadDim, 1>;
  using LayoutK = LayoutRows8<kBlockN, kHeadDim, kStages>;
  using LayoutVt = LayoutRows8<kHeadDim, kBlockN, kStages>;

  // Calls visit() with a value of the 16-bit type of the output.
  template <class Visit>
  CUTLASS_DEVICE static void visit_out_element(Params const& params, Visit const& visit) {
    params.out_fp16 ? visit(cutlass::half_t{}) : visit(cutlass::bfloat16_t{});
  }

  static constexpr int kSizeQ = kBlockM * kHeadDim;
  static constexpr int kSizeK = kBlockN * kHeadDim;  // of one stage; and of V
  static constexpr int kSizeOut = 64 * kHeadDim;     // elements of a warpgroup's output

  struct SharedStorage {
    alignas(1024) uint8_t query[kSizeQ];
    alignas(1024) uint8_t key[kStages * kSizeK];
    alignas(1024) uint8_t value[kStages * kSizeK];
    alignas(1024) uint16_t out_rows[kConsumerWarpgroups * kSizeOut];
    FullBarrier query_full[kConsumerWarpgroups];
    EmptyBarrier query_empty[kConsumerWarpgroups];
    Pipeline<kStages> step_pipeline;  // K of block n and V of block n + 1: what a step reads
    Pipeline<kWorkStages> work_pipeline;
    WorkTile work[kWorkStages];
    // Those of the tile's blocks that a warpgroup's 64 rows see.
    BlockRange warpgroup_blocks[kWorkStages][kConsumerWarpgroups];
    StepScale scale[kStages];
    // Of the tile at hand, those of each four consumer threads; in registers they would be in the
    // way in steps without a mask.
    alignas(16) Interval rows[kConsumerThreads / 4][kRowsPerThread];
    alignas(128) uint8_t ones[kSumsByMma ? kConsumerWarpgroups : 1][kSumsByMma ? kSizeOnes : 1];

    CUTLASS_DEVICE void init_barriers() {
      constexpr int kConsumerWarps = kConsumerWarpgroups * 4;
      init_query_barriers(query_full, query_empty);
      step_pipeline.init(kConsumerWarps);
      work_pipeline.init(kConsumerWarps + 1);  // and the loading warp
      cutlass::arch::fence_barrier_init();
    }

    // A warpgroup's 64 rows of the output.
    CUTLASS_DEVICE uint16_t* out(int warpgroup) { return out_rows + warpgroup * kSizeOut; }
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace jax_fa3::fp8
