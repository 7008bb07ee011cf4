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

// What is read, and how.
enum class Reads {
  kAsComputed,  // a cache of the query's dtype
  kWidened,     // an e4m3 cache, widened in shared memory (widen.h)
  kFew,         // an e4m3 cache for up to 16 query rows, widened in registers (few.h)
};

// Positions of a block: 12 KB of keys or 16, or 32 where an SM has one CTA; of an e4m3 cache never
// more than 64, as registers hold their scales, too. A warp of few.h always has 16.
constexpr int block_n(int head_dim, Reads reads) {
  if (reads == Reads::kFew) return 64;
  if (head_dim <= 64 && reads == Reads::kAsComputed) return 128;
  return head_dim <= 128 || head_dim > 192 ? 64 : 32;
}

// What TMA fills of an e4m3 cache, for others to widen (widen.h).
template <int kStages, int kSize, int kScaleStages, int kBlockN>
struct Loads {
  alignas(128) uint8_t ring[kStages][kSize];
  Pipeline<kStages> pipeline;
  float scales[kStages][2 * kBlockN];           // of a block's keys, and of its values
  float scales_out[kScaleStages][2 * kBlockN];  // what consumers read
};
// Of a tile that the CTAs of a cluster share (cluster.h).
constexpr int kLargestCluster = 16;
constexpr int kClusterRows = 8;
constexpr int received_bytes(int head_dim_v) {
  return kClusterRows * (head_dim_v + kLargestCluster) * 4;
}

// How the warps' parts of a tile become one (few.h).
template <int kHeadDimV>
struct Few {
  float4 out[4][8][kHeadDimV / 4];
  struct {
    float maximum, offset, sum;
  } statistics[4][16];
  float lse[8];
  alignas(16) uint8_t received[received_bytes(kHeadDimV)];
};
template <int kStages, int kBlockN>
struct Scales {
  alignas(16) float data[kStages][2 * kBlockN];  // as in Loads
};
struct Nothing {};

template <class Element_, int kHeadDim_, int kHeadDimV_, int kWarpgroups_, Reads kReads_>
struct Traits {
  using Element = Element_;  // of queries, and but in few.h of what is computed with
  static constexpr Reads kReads = kReads_;
  static constexpr bool kE4M3 = kReads != Reads::kAsComputed;  // the cache is
  static constexpr bool kWidens = kReads == Reads::kWidened;
  static constexpr bool kFew = kReads == Reads::kFew;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kWarpgroups = kWarpgroups_;  // consumers, 64 rows each
  static constexpr int kBlockM = kFew ? 16 : 64 * kWarpgroups;
  static constexpr int kBlockN = block_n(kHeadDim, kReads);

  // With one consumer there are two CTAs on an SM: while one waits, the other one computes. Only
  // where a thread's part of O is too large for half of an SM's registers there is one. Each has a
  // producer warpgroup: a warp loads keys and values, a warp schedules and loads queries.
  static constexpr int kCtasPerSm = kWarpgroups > 1 || kHeadDimV > (kFew ? 128 : 192) ? 1 : 2;
  static constexpr int kThreads = 128 + kWarpgroups * 128;
  static constexpr bool kMovesRegisters = kCtasPerSm > 1 || kWarpgroups > 1;
  static constexpr int kProducerRegisters = 72;  // with two consumers, all that a CTA begins with
  static constexpr int kConsumerRegisters = kWarpgroups > 1 ? 216 : 256 - kProducerRegisters;

  static constexpr int kSlab = slab(kHeadDim);
  static constexpr int kSlabV = slab(kHeadDimV);
  static constexpr int kSizeQ = kBlockM * kHeadDim;
  static constexpr int kSizeK = kBlockN * kHeadDim;  // of one stage
  static constexpr int kSizeV = kBlockN * kHeadDimV;
  // Blocks of keys and of values take turns in one ring, as long as memory allows. Of an e4m3 cache
  // that is the ring in front of it, and this one has what the consumers have in hand and one more.
  static constexpr int kSizeStage = std::max(kSizeK, kSizeV);
  static constexpr int kSharedBytes =
      (228 / kCtasPerSm - 1) * 1024;  // an SM has 228 KB, and takes 1 for each CTA
  static constexpr int kFreeBytes = kSharedBytes - 1024 - kSizeQ * 2;
  using InRing = std::conditional_t<kFew, uint8_t, uint16_t>;
  using AtEnd = std::conditional_t<kFew, Few<kHeadDimV>, Nothing>;
  static constexpr int kScaleBytes = kBlockN * 8;
  static constexpr int kStages =
      kFew ? (kFreeBytes - int{sizeof(AtEnd)} - 512) / (kSizeStage + kScaleBytes)
           : (kWidens ? 3 : kFreeBytes / (kSizeStage * 2));
  static constexpr int kScaleStages = kStages;
  static constexpr int kLoadStages =
      kWidens ? (kFreeBytes - kStages * kSizeStage * 2 - kScaleStages * kScaleBytes - 512) /
                    (kSizeStage + kScaleBytes)
              : kStages;
  static_assert(kLoadStages >= 4);
  static constexpr int kWideners = 64;  // threads
  // The slabs that TMA writes.
  static constexpr int kLoadSlab = kFew ? slab8(kHeadDim) : (kWidens ? kHeadDim : kSlab);
  static constexpr int kLoadSlabV = kFew ? slab8(kHeadDimV) : (kWidens ? kHeadDimV : kSlabV);
  static constexpr int kWorkStages = 3;
  // Parts may be flagged (merge.h), where registers allow.
  static constexpr bool kFlags = !kFew && kHeadDim <= 128 && kHeadDimV <= 128;
  // A cluster's CTAs may share a tile: what a CTA gets of it lies in the query's first slab, behind
  // the rows that there are, where others may write whenever they like.
  static constexpr bool kClusters =
      kFew || (kWarpgroups == 1 && !kWidens &&
               received_bytes(kHeadDimV) <= (kBlockM - kClusterRows) * kSlab * 2);

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

  // A thread's part of O.
  CUTLASS_DEVICE static auto make_out() {
    if constexpr (kFew) {
      return make_tensor<float>(Int<kHeadDimV / 2>{});
    } else {
      return partition_fragment_C(MmaPV{}, Shape<Int<kBlockM>, Int<kHeadDimV>>{});
    }
  }

  struct ConsumerState {
    PipelineState<kStages> ring;
    PipelineState<kWorkStages> work;
    PipelineState<kScaleStages> scales;
    uint32_t query_phase = 0;
  };

  struct SharedStorage {
    alignas(1024) uint16_t query[kSizeQ];
    alignas(1024) InRing ring[kStages][kSizeStage];
    FullBarrier query_full;
    EmptyBarrier query_empty;
    Pipeline<kStages> pipeline;
    std::conditional_t<kWidens, Loads<kLoadStages, kSizeStage, kScaleStages, kBlockN>, Nothing>
        loads;
    std::conditional_t<kFew, Scales<kStages, kBlockN>, Nothing> scales;
    AtEnd few;
    FullBarrier received_full;  // of a cluster
    Pipeline<kWorkStages> work_pipeline;
    Work work[kWorkStages];
    bool lacks_page[kWorkStages];  // a page that the work needs does not exist
    int warp_sums[2][kThreads / 32];
    int known_units[kKnownUnits];  // of sequences
    int fetched;                   // by fetch_table()
    bool is_last[kWorkStages];     // to store its part of a tile

    CUTLASS_DEVICE float* received() {
      if constexpr (kFew) {
        return reinterpret_cast<float*>(few.received);
      } else {
        return reinterpret_cast<float*>(query + kClusterRows * kSlab);
      }
    }
    CUTLASS_DEVICE auto& load_ring() {
      if constexpr (kWidens) {
        return loads.ring;
      } else {
        return ring;
      }
    }
    CUTLASS_DEVICE auto& load_pipeline() {
      if constexpr (kWidens) {
        return loads.pipeline;
      } else {
        return pipeline;
      }
    }
    CUTLASS_DEVICE auto& load_scales() {
      if constexpr (kWidens) {
        return loads.scales;
      } else {
        return scales.data;
      }
    }
    CUTLASS_DEVICE void init_barriers() {
      query_full.init(1);
      received_full.init(1);
      constexpr int kConsumerWarps = kWarpgroups * 4;
      query_empty.init(kConsumerWarps);
      constexpr int kLoading = kE4M3 ? 1 + 32 : 1;  // each lane's scales arrive by themselves
      constexpr int kWarps = kWidens ? kWideners / 32 : 0;
      if constexpr (kWidens) {
        loads.pipeline.init(kWarps, kLoading);
        pipeline.init(kConsumerWarps, kWarps);
      } else {
        pipeline.init(kConsumerWarps, kLoading);
      }
      work_pipeline.init(kConsumerWarps + 1 + kWarps);  // and the loading warp
      cutlass::arch::fence_barrier_init();
    }
  };
  static_assert(sizeof(SharedStorage) <= kSharedBytes);
};

}  // namespace jax_fa3::decode
