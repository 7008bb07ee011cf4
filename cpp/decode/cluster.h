// Few tiles: a cluster of CTAs shares each of them by itself, in equal pieces. Each CTA sends what
// it has of a tile to the others' shared memory, and joins what it gets there, a part of each row.
// So there is no workspace, no counter to be reset in front, and no CTA needs to know of other
// sequences than its own. The grid is (head, rank in the cluster) x sequence.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "decode/merge.h"
#include "decode/traits.h"

namespace jax_fa3::decode {

// `barrier` counts the bytes, there.
template <int kFloats>
CUTLASS_DEVICE void store_to_rank(float* smem, FullBarrier& barrier, int rank,
                                  float const (&x)[kFloats]) {
  uint32_t const address = set_block_rank(cast_smem_ptr_to_uint(smem), rank);
  uint32_t const counts = set_block_rank(cast_smem_ptr_to_uint(&barrier), rank);
#define JAX_FA3_STORE "st.async.shared::cluster.mbarrier::complete_tx::bytes"
  if constexpr (kFloats == 4) {
    asm volatile(JAX_FA3_STORE ".v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(address), "r"(counts),
                 "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
  } else {
    asm volatile(JAX_FA3_STORE ".f32 [%0], %2, [%1];" ::"r"(address), "r"(counts), "f"(x[0])
                 : "memory");
  }
#undef JAX_FA3_STORE
}

// The rows of a tile, normalised, and their log-sum-exps, as all CTAs of a cluster have them.
template <class Traits>
class SharedTile {
 public:
  CUTLASS_DEVICE SharedTile(typename Traits::SharedStorage& storage, Params const& params)
      : outs(storage.received()),
        lses(outs + kClusterRows * Traits::kHeadDimV),
        received(storage.received_full),
        cluster(params.cluster),
        rank(static_cast<int>(blockIdx.x) & (cluster - 1)) {}

  // By the thread that has initialised the barriers: what is to come here.
  CUTLASS_DEVICE void expect(int rows) const {
    int const vectors = (rows * kVectors - rank + cluster - 1) >> (__ffs(cluster) - 1);
    received.arrive_and_expect_tx(cluster * (vectors * 16 + rows * 4));
  }
  // By all threads that send.
  CUTLASS_DEVICE static void wait_until_others_run() { cluster_wait(); }

  // Vectors of 4 columns are dealt out.
  CUTLASS_DEVICE void send_out(int row, int column, float const (&x)[4]) const {
    int const vector = row * kVectors + column / 4;
    int const to = vector & (cluster - 1);
    store_to_rank(outs + (vector - to + rank) * 4, received, to, x);
  }
  CUTLASS_DEVICE void send_lse(int row, int to, float lse) const {
    store_to_rank(lses + row * kLargestCluster + rank, received, to, {lse});
  }

  // All consumers, when they have sent.
  CUTLASS_DEVICE void join(Params const& params, Work const& work) const {
    received.wait(0);
    constexpr int kThreads = Traits::kWarpgroups * 128;
    constexpr int kLanes = 4;  // that sum up a vector's parts
    int const thread = threadIdx.x - (Traits::kThreads - kThreads);
    int const lane = threadIdx.x % kLanes;
    int const end = params.slot_rows * kVectors;
    OutRow const tile{work.sequence.first_row, work.sequence.count, work.head, work.tile};
    CUTLASS_PRAGMA_NO_UNROLL
    for (int of_warp = thread / 32 * (32 / kLanes); of_warp * cluster < end;
         of_warp += kThreads / kLanes) {
      int const first = (of_warp + threadIdx.x % 32 / kLanes) * cluster;
      bool const exists = first < end;
      int const row = exists ? (first + rank) / kVectors : 0;
      int const column = (first + rank) % kVectors * 4;
      float lse_of[kLargestCluster / kLanes];
      float top = -INFINITY;  // a NaN comes back by its difference
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kLargestCluster / kLanes; ++i) {
        int const part = lane + i * kLanes;
        lse_of[i] = part < cluster ? lses[row * kLargestCluster + part] : -INFINITY;
        top = fmaxf(top, lse_of[i]);
      }
      top = quad_max(top);
      if (top == -INFINITY) top = 0.f;
      float sum = 0.f;
      float4 out{0.f, 0.f, 0.f, 0.f};
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kLargestCluster / kLanes; ++i) {
        int const part = lane + i * kLanes;
        if (!exists || part >= cluster) continue;
        float const w = exp2f((lse_of[i] - top) * kLog2E);
        auto const x = reinterpret_cast<float4 const*>(outs)[first + part];
        sum += w;
        out = {fmaf(w, x.x, out.x), fmaf(w, x.y, out.y), fmaf(w, x.z, out.z), fmaf(w, x.w, out.w)};
      }
      sum = quad_sum(sum);
      out = {quad_sum(out.x), quad_sum(out.y), quad_sum(out.z), quad_sum(out.w)};
      if (!exists || lane > 0) continue;
      int64_t const index =
          tile.index(row, Traits::kBlockM, params.tiles.group, params.num_heads_q);
      if (index < 0) continue;
      float lse = sum == 0.f ? -INFINITY : top + logf(sum);
      float const scale = add_sink(params, index, &lse) * (sum == 0.f ? 0.f : 1.f / sum);
      store_merged<typename Traits::Element>(params, index, column, out, scale, lse);
    }
  }

 private:
  static constexpr int kVectors = Traits::kHeadDimV / 4;  // of a row
  float* outs;                                            // [vectors of all rows][part][4]
  float* lses;                                            // [row][part]
  FullBarrier& received;                                  // counts its bytes
  int cluster;
  int rank;
};

}  // namespace jax_fa3::decode
