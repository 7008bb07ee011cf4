// Shape of the machine code of one decoding kernel.
#pragma once

#include <algorithm>
#include <cute/tensor.hpp>

#include "common/barriers.h"
#include "common/layouts.h"
#include "common/softmax.h"
#include "decode/params.h"
#include "decode/schedule.h"

namespace jax_fa3::decode {

using namespace cute;

// Positions of a block: 12 KB of keys or 16, or 32 where an SM has one CTA.
constexpr int block_n(int head_dim) {
  return head_dim <= 64 ? 128 : (head_dim <= 128 || head_dim > 192 ? 64 : 32);
}

template <class Element_, int kHeadDim_, int kHeadDimV_, int kWarpgroups_>
struct Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kWarpgroups = kWarpgroups_;  // consumers, 64 rows each
  static constexpr int kBlockM = 64 * kWarpgroups;
  static constexpr int kBlockN = block_n(kHeadDim);

  // With one consumer there are two CTAs on an SM: while one waits, the other one computes. Only
  // where a thread's part of O is too large for half of an SM's registers there is one. Each has a
  // producer warpgroup: a warp loads keys and values, a warp schedules and loads queries.
  static constexpr int kCtasPerSm = kWarpgroups > 1 || kHeadDimV > 192 ? 1 : 2;
  static constexpr int kThreads = 128 + kWarpgroups * 128;
  static constexpr bool kMovesRegisters = kCtasPerSm > 1 || kWarpgroups > 1;
  static constexpr int kProducerRegisters = 80;
  static constexpr int kConsumerRegisters = kWarpgroups > 1 ? 216 : 176;

  static constexpr int kSlab = slab(kHeadDim);
  static constexpr int kSlabV = slab(kHeadDimV);
  static constexpr int kSizeQ = kBlockM * kHeadDim;
  static constexpr int kSizeK = kBlockN * kHeadDim;  // of one stage
  static constexpr int kSizeV = kBlockN * kHeadDimV;
  // Blocks of keys and of values take turns in one ring, as long as memory allows.
  static constexpr int kSizeStage = std::max(kSizeK, kSizeV);
  static constexpr int kSharedBytes =
      (228 / kCtasPerSm - 1) * 1024;  // an SM has 228 KB, and takes 1 for each CTA
  static constexpr int kStages = (kSharedBytes - 1024 - kSizeQ * 2) / (kSizeStage * 2);
  static_assert(kStages >= 4);
  static constexpr int kWorkStages = 3;

  using MmaQK = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kBlockN>, Int<kHeadDim>>>(),
      Layout<Shape<Int<kWarpgroups>, _1, _1>>{}));
  using MmaPV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kHeadDimV>, Int<kBlockN>>,
                           GMMA::Major::K, GMMA::Major::MN>(),
      Layout<Shape<Int<kWarpgroups>, _1, _1>>{}));
  static_assert(tile_size<1>(MmaQK{}) == kBlockN && tile_size<1>(MmaPV{}) == kHeadDimV,
                "one wgmma must span the tile: declare its shape");

  using LayoutQ = LayoutRows<kBlockM, kHeadDim, 1>;
  using LayoutK = LayoutRows<kBlockN, kHeadDim, 1>;
  using LayoutVt = LayoutColumns<kBlockN, kHeadDimV, 1>;

  struct ConsumerState {
    PipelineState<kStages> ring;
    PipelineState<kWorkStages> work;
    uint32_t query_phase = 0;
  };

  struct SharedStorage {
    alignas(1024) uint16_t query[kSizeQ];
    alignas(1024) uint16_t ring[kStages][kSizeStage];
    FullBarrier query_full;
    EmptyBarrier query_empty;
    Pipeline<kStages> pipeline;
    Pipeline<kWorkStages> work_pipeline;
    Work work[kWorkStages];
    bool lacks_page[kWorkStages];  // a page that the work needs does not exist
    int warp_units[kThreads / 32];

    CUTLASS_DEVICE void init_barriers() {
      query_full.init(1);
      constexpr int kConsumerWarps = kWarpgroups * 4;
      query_empty.init(kConsumerWarps);
      pipeline.init(kConsumerWarps);
      work_pipeline.init(kConsumerWarps + 1);  // and the loading warp
      cutlass::arch::fence_barrier_init();
    }
  };
  static_assert(sizeof(SharedStorage) <= kSharedBytes);
};

}  // namespace jax_fa3::decode
