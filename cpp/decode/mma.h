// The mainloop of a consumer warpgroup: block by block, from the first to the last.
#pragma once

#include "common/gemm.h"
#include "common/softmax.h"
#include "decode/barriers.h"
#include "decode/params.h"
#include "decode/traits.h"

namespace jax_fa3::decode {

// Zeroes the rows of a block of values that no row of the tile sees: they may hold anything, and a
// probability of 0 does not silence NaN. Each warpgroup zeroes them all, before it reads them.
template <class Traits>
CUTLASS_DEVICE void zero_unseen(uint16_t* smem, int warpgroup, int seen_begin, int seen_end) {
  constexpr int kVectors = Traits::kSlabV / 8;  // of a row in its slab, contiguous if swizzled
  constexpr int kVectorsOfSlab = Traits::kBlockN * kVectors;
  auto* const vectors = reinterpret_cast<uint4*>(smem);
  CUTLASS_PRAGMA_NO_UNROLL
  for (int i = threadIdx.x % 128; i < Traits::kSizeV / 8; i += 128) {
    int const row = i % kVectorsOfSlab / kVectors;
    if (row < seen_begin || row >= seen_end) vectors[i] = uint4{0, 0, 0, 0};
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(128, barrier_id(NamedBarrier::kValuesZeroed0, warpgroup));
}

// Multiplies each column of a fragment by its scale; `scales` is at the thread's column 0.
template <class Fragment>
CUTLASS_DEVICE void scale_columns(float const* scales, Fragment& fragment) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(fragment); i += 4) {
    auto const scale = *reinterpret_cast<float2 const*>(scales + fragment_column(i));
    fragment(i) *= scale.x;
    fragment(i + 1) *= scale.y;
    fragment(i + 2) *= scale.x;
    fragment(i + 3) *= scale.y;
  }
}

// Computes O (not yet divided by the row sums) and the softmax statistics of one work. S of a block
// is computed together with P V of the block before.
template <class Traits, class Out>
CUTLASS_DEVICE void mma(Params const& params, typename Traits::SharedStorage& storage,
                        typename Traits::ConsumerState& state, Work const& work, int warpgroup,
                        Interval const (&rows)[kRowsPerThread], Softmax& softmax, Out& tOrO) {
  using Element = typename Traits::Element;
  constexpr int kBlockN = Traits::kBlockN;
  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  Tensor tSrQ = operand_a(mma_qk, warpgroup, storage.query, typename Traits::LayoutQ{})(_, _, _, 0);
  Tensor tSrS = partition_fragment_C(mma_qk, Shape<Int<Traits::kBlockM>, Int<kBlockN>>{});
  // P as the A operand of P V: the same elements in the same order as S in the accumulator.
  Tensor tOrP = make_fragment_like<Element>(mma_pv.get_slice(0).partition_A(
      make_tensor<Element>(Shape<Int<Traits::kBlockM>, Int<kBlockN>>{})));
  static_assert(size(tOrP) == size(tSrS));

  int const lane_column = threadIdx.x % 4 * 2;
  bool const elected = threadIdx.x % 32 == 0;
  auto& ring = storage.pipeline;
  auto const issue_scores = [&](auto const& position) {
    Tensor tSrK = operand_b(mma_qk, warpgroup, storage.ring[position.stage],
                            typename Traits::LayoutK{})(_, _, _, 0);
    issue_gemm_zero(mma_qk, tSrQ, tSrK, tSrS);
  };
  auto const issue_out = [&](auto const& position) {
    Tensor tOrV = operand_b(mma_pv, warpgroup, storage.ring[position.stage],
                            typename Traits::LayoutVt{})(_, _, _, 0);
    issue_gemm(mma_pv, tOrP, tOrV, tOrO);
  };
  auto const release = [&](auto const& position) {
    if (elected) ring.empty[position.stage].arrive();
  };
  storage.query_full.wait(state.query_phase);  // and what the schedule has put off
  state.query_phase ^= 1;
  int const end = work.end;
  // With a soft cap, which is applied where the mask is, all blocks are masked.
  int const full_begin = work.full_begin;
  int const full_end = params.score.cap_scale == 0.f ? work.full_end : full_begin;
  Interval const positions = work.positions;
  auto const mask_block = [&](int n_block) {
    params.score.apply(tSrS);
    mask_scores(tSrS, rows, n_block * kBlockN + lane_column);
  };
  auto const scale_scores = [&] {
    if constexpr (Traits::kE4M3) {
      scale_columns(storage.loads.scales_out[state.scales.stage] + lane_column, tSrS);
    }
  };
  Tensor packed_p = recast<uint32_t>(tOrP);
  auto const convert = [&] {
    if constexpr (Traits::kE4M3) {
      if (params.value_scale.of_positions) {
        scale_columns(storage.loads.scales_out[state.scales.stage] + kBlockN + lane_column, tSrS);
      }
      state.scales.advance();
    }
    copy(packed<Element>(tSrS), packed_p);
  };
  // The values of a block, ready to be multiplied.
  auto const wait_for_values = [&](int n_block) {
    ring.full[state.ring.stage].wait(state.ring.phase);
    int const seen_begin = positions.begin - n_block * kBlockN;
    int const seen_end = positions.end - n_block * kBlockN;
    if (seen_begin > 0 || seen_end < kBlockN) {
      zero_unseen<Traits>(storage.ring[state.ring.stage], warpgroup, seen_begin, seen_end);
    }
  };

  // The first block: nothing to overlap with.
  int n_block = work.begin;
  clear(tOrO);
  ring.full[state.ring.stage].wait(state.ring.phase);
  issue_scores(state.ring);
  warpgroup_wait<0>();
  warpgroup_fence_operand(tSrS);
  release(state.ring);
  state.ring.advance();
  if (elected && n_block + 1 == end) storage.query_empty.arrive();
  scale_scores();
  if (n_block < full_begin || n_block >= full_end) mask_block(n_block);
  softmax.update_max(tSrS);
  softmax.template exponentiate<0, 1>(tSrS);
  convert();

  auto const step = [&](auto masked) {
    auto const value = state.ring;
    wait_for_values(n_block - 1);
    state.ring.advance();
    ring.full[state.ring.stage].wait(state.ring.phase);
    issue_scores(state.ring);
    issue_out(value);
    warpgroup_wait<1>();
    warpgroup_fence_operand(tSrS);
    release(state.ring);
    state.ring.advance();
    scale_scores();
    if constexpr (decltype(masked)::value) mask_block(n_block);
    softmax.update_max(tSrS);
    softmax.template exponentiate<0, 1>(tSrS);
    warpgroup_wait<0>();
    warpgroup_fence_operand(tOrO);
    release(value);
    if (elected && n_block + 1 == end) storage.query_empty.arrive();
    convert();
    softmax.rescale_out(tOrO);
  };
  for (++n_block; n_block < end; ++n_block) {
    if (n_block < full_begin || n_block >= full_end) {
      step(true_type{});
    } else {
      step(false_type{});
    }
  }

  wait_for_values(end - 1);
  issue_out(state.ring);
  warpgroup_wait<0>();
  warpgroup_fence_operand(tOrO);
  release(state.ring);
  state.ring.advance();
}

}  // namespace jax_fa3::decode
