// Few tiles: a cluster of CTAs shares each of them by itself, in equal pieces. Each CTA sends what
// it has of a tile to the others' shared memory, and joins what it gets there, a part of each row.
// So there is no workspace, no counter to be reset in front, and no CTA needs to know of other
// sequences than its own. The grid is (head, rank in the cluster) x sequence.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "decode/merge.h"
#include "decode/traits.h"

namespace jax_fa3::decode {

template <int kFloats>
CUTLASS_DEVICE void store_to_rank(float* smem, int rank, float const (&x)[kFloats]) {
  uint32_t const address = set_block_rank(cast_smem_ptr_to_uint(smem), rank);
  if constexpr (kFloats == 4) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]),
                 "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
  } else if constexpr (kFloats == 2) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x[0]), "f"(x[1])
                 : "memory");
  } else {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(x[0]) : "memory");
  }
}

// The rows of a tile, normalised, and their log-sum-exps, as all CTAs of a cluster have them.
template <class Traits>
class SharedTile {
 public:
  CUTLASS_DEVICE SharedTile(typename Traits::SharedStorage& storage, Params const& params)
      : outs(storage.received()),
        lses(outs + kClusterRows * Traits::kHeadDimV),
        cluster(params.cluster),
        rank(static_cast<int>(blockIdx.x) & (cluster - 1)) {}

  // By all threads that send.
  CUTLASS_DEVICE static void wait_until_others_run() { cluster_wait(); }

  // 2 or 4 columns. Vectors of 4 are dealt out.
  template <int kFloats>
  CUTLASS_DEVICE void send_out(int row, int column, float const (&x)[kFloats]) const {
    int const vector = row * kVectors + column / 4;
    int const to = vector & (cluster - 1);
    store_to_rank(outs + (vector - to + rank) * 4 + column % 4, to, x);
  }
  CUTLASS_DEVICE void send_lse(int row, int to, float lse) const {
    store_to_rank(lses + row * kLargestCluster + rank, to, {lse});
  }

  // All consumers, when they have sent.
  CUTLASS_DEVICE void join(Params const& params, Work const& work) const {
    cluster_arrive();
    cluster_wait();
    constexpr int kThreads = Traits::kWarpgroups * 128;
    int const thread = threadIdx.x - (Traits::kThreads - kThreads);
    OutRow const tile{work.sequence.first_row, work.sequence.count, work.head, work.tile};
    CUTLASS_PRAGMA_NO_UNROLL
    for (int first = thread * cluster; first < params.slot_rows * kVectors;
         first += kThreads * cluster) {
      int const row = (first + rank) / kVectors;
      int const column = (first + rank) % kVectors * 4;
      int64_t const index =
          tile.index(row, Traits::kBlockM, params.tiles.group, params.num_heads_q);
      if (index < 0) break;
      float const* const parts = lses + row * kLargestCluster;
      float top = -INFINITY;  // a NaN comes back by its difference
      CUTLASS_PRAGMA_NO_UNROLL
      for (int part = 0; part < cluster; ++part) top = fmaxf(top, parts[part]);
      if (top == -INFINITY) top = 0.f;
      float sum = 0.f;
      float4 out{0.f, 0.f, 0.f, 0.f};
      CUTLASS_PRAGMA_NO_UNROLL
      for (int part = 0; part < cluster; ++part) {
        float const w = exp2f((parts[part] - top) * kLog2E);
        auto const x = reinterpret_cast<float4 const*>(outs)[first + part];
        sum += w;
        out = {fmaf(w, x.x, out.x), fmaf(w, x.y, out.y), fmaf(w, x.z, out.z), fmaf(w, x.w, out.w)};
      }
      float lse = sum == 0.f ? -INFINITY : top + logf(sum);
      float const scale = add_sink(params, index, &lse) * (sum == 0.f ? 0.f : 1.f / sum);
      store_merged<typename Traits::Element>(params, index, column, out, scale, lse);
    }
  }

 private:
  static constexpr int kVectors = Traits::kHeadDimV / 4;  // of a row
  float* outs;                                            // [vectors of all rows][part][4]
  float* lses;                                            // [row][part]
  int cluster;
  int rank;
};

}  // namespace jax_fa3::decode
