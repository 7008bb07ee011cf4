// The two GEMMs of an FP8 consumer warpgroup: their operands and accumulators.
#pragma once

#include "common/gemm.h"
#include "fp8/traits.h"

namespace jax_fa3::fp8 {

// threadIdx.x, read anew from its special register: else ptxas keeps what is computed of it in
// registers throughout the mainloop.
inline __device__ int thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// The intervals of this thread's rows, where it left them itself, as the three that share its rows.
template <class Storage>
CUTLASS_DEVICE auto& rows_of_thread(Storage& storage) {
  return storage.rows[thread_index() / 4 - 32];
}

// Tiles in shared memory as operands, that is wgmma descriptors: Q's; K's and V's of all stages.
template <class Traits>
CUTLASS_DEVICE auto query_operand(uint8_t* query, int warpgroup) {
  return operand_a(typename Traits::MmaQK{}, warpgroup, query, typename Traits::LayoutQ{})(_, _, _,
                                                                                           0);
}
template <class Traits>
CUTLASS_DEVICE auto key_operand(uint8_t* key, int warpgroup) {
  return operand_b(typename Traits::MmaQK{}, warpgroup, key, typename Traits::LayoutK{});
}
template <class Traits>
CUTLASS_DEVICE auto value_operand(uint8_t* value, int warpgroup) {
  return operand_b(typename Traits::MmaPV{}, warpgroup, value, typename Traits::LayoutVt{});
}

template <class Traits>
CUTLASS_DEVICE auto ones_operand(uint8_t* ones, int warpgroup) {
  return operand_b(typename Traits::MmaSum{}, warpgroup, ones, typename Traits::LayoutOnes{});
}

// Registers: the accumulators, and P as the A operand of P V.
template <class Traits>
CUTLASS_DEVICE auto score_accumulator() {
  return partition_fragment_C(typename Traits::MmaQK{},
                              Shape<Int<Traits::kBlockM>, Int<Traits::kBlockN>>{});
}
template <class Traits>
CUTLASS_DEVICE auto probability_operand() {
  using Element = typename Traits::Element;
  Tensor P = make_tensor<Element>(Shape<Int<Traits::kBlockM>, Int<Traits::kBlockN>>{});
  return make_fragment_like<Element>(typename Traits::MmaPV{}.get_slice(0).partition_A(P));
}
template <class Traits, int kColumns>
CUTLASS_DEVICE auto out_accumulator() {
  return partition_fragment_C(typename Traits::MmaPV{},
                              Shape<Int<Traits::kBlockM>, Int<kColumns>>{});
}

template <class Traits>
struct WarpgroupMma {
  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  decltype(query_operand<Traits>(nullptr, 0)) tSrQ;
  decltype(key_operand<Traits>(nullptr, 0)) tSrK;
  decltype(value_operand<Traits>(nullptr, 0)) tOrV;
  decltype(score_accumulator<Traits>()) tSrS;
  decltype(ones_operand<Traits>(nullptr, 0)) tOnes;
  decltype(probability_operand<Traits>()) tOrP;
  decltype(out_accumulator<Traits, Traits::kHeadDim>()) tOrO;
  // P V of a step's part. Where it is as large as S it is summed in the registers of S.
  using Part = decltype(out_accumulator<Traits, Traits::kPartColumns>());
  static constexpr bool kPartOverScores = Traits::kPartColumns == Traits::kBlockN;
  static_assert(decltype(size(tOrP))::value == decltype(size(tSrS))::value);

  __device__ WarpgroupMma(typename Traits::SharedStorage& storage, int warpgroup)
      : tSrQ(query_operand<Traits>(storage.query, warpgroup)),
        tSrK(key_operand<Traits>(storage.key, warpgroup)),
        tOrV(value_operand<Traits>(storage.value, warpgroup)),
        tOnes(ones_operand<Traits>(storage.ones[Traits::kSumsByMma ? warpgroup : 0], warpgroup)) {}

  // S = Q K^T, of the key block in this stage.
  CUTLASS_DEVICE void issue_scores(int stage) {
    issue_gemm_zero(mma_qk, tSrQ, tSrK(_, _, _, stage), tSrS);
  }

  // P from fp32 to e4m3. Four elements of a register of the A operand come from two pairs of
  // columns of the accumulator: V's keys are ordered so that this is right (transpose.h).
  CUTLASS_DEVICE void convert_scores() {
    Tensor packed = recast<uint32_t>(tOrP);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(packed); ++i) {  // [row, half of 32 keys, 32 keys]
      int const first = i / 4 * 16 + i / 2 % 2 * 8 + i % 2 * 2;
      packed(i) = pack_e4m3(tSrS(first), tSrS(first + 1), tSrS(first + 4), tSrS(first + 5));
    }
  }

  // Unless no row of the warp needs it.
  CUTLASS_DEVICE void rescale_out(Softmax const& softmax) {
    bool const changes = softmax.rescale[0] != 1.f || softmax.rescale[1] != 1.f;
    if (!__any_sync(~0u, changes)) return;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); ++i) tOrO(i) *= softmax.rescale[fragment_row(i)];
  }

  // O += value_scale * P V, of the value block in this stage, and row_sum += P if kSumsByMma. Waits
  // for it. (Accumulators as members would be alive throughout the loop: wgmma may add to them.)
  CUTLASS_DEVICE void add_out(int stage, float const& value_scale,
                              float (&row_sum)[kRowsPerThread]) {
    if constexpr (kPartOverScores) {
      add_parts(stage, value_scale, row_sum, make_tensor(tSrS.data(), Part{}.layout()));
    } else {
      add_parts(stage, value_scale, row_sum, Part{});
    }
  }

 private:
  // The sums are P times ones, issued behind P V of the last part, with one wait for both: issued
  // before it they gain half as much.
  template <class PartOfOut>
  CUTLASS_DEVICE void add_parts(int stage, float const& value_scale,
                                float (&row_sum)[kRowsPerThread], PartOfOut part_of_out) {
    constexpr int kSize = decltype(size(part_of_out))::value;
    constexpr int kParts = Traits::kHeadDim / Traits::kPartColumns;
    auto sums = partition_fragment_C(typename Traits::MmaSum{},
                                     Shape<Int<Traits::kBlockM>, Int<Traits::kSumColumns>>{});
    float scale;
    for_each(make_seq<kParts>{}, [&](auto part) {
      constexpr bool kSums = Traits::kSumsByMma && part == kParts - 1;
      if constexpr (kSums) warpgroup_fence_operand(sums);
      Tensor V = tOrV(_, _, _, stage)(_, part, _);
      issue_gemm_zero(
          mma_pv, tOrP,
          make_tensor(V.data(), make_layout(get<0>(V.layout()), Layout<_1>{}, get<1>(V.layout()))),
          part_of_out);
      if constexpr (kSums) issue_sums(sums);
      warpgroup_wait<0>();
      warpgroup_fence_operand(part_of_out);
      if constexpr (part == 0) scale = value_scale;
      if constexpr (kSums) warpgroup_fence_operand(sums);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) tOrO(part * kSize + i) += part_of_out(i) * scale;
      if constexpr (kSums) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(sums); ++i) row_sum[fragment_row(i)] += sums(i);
      }
    });
  }

  template <class Sums>
  CUTLASS_DEVICE void issue_sums(Sums& sums) {
    typename Traits::MmaSum mma_sum;
    mma_sum.accumulate_ = GMMA::ScaleOut::Zero;
    Tensor ones = recomputed(tOnes);
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < size<2>(tOrP); ++k) {
      cute::gemm(mma_sum, tOrP(_, _, k), ones(_, _, 0), sums);
      mma_sum.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
  }
};

}  // namespace jax_fa3::fp8
