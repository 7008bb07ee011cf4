// The mainloops of the two consumer warpgroups.
//
// The first computes S of a block, the weights P, which it leaves in shared
// memory, and O's first 256 columns; the second the other 256. As in the
// forward of narrow heads, S of the next block is computed before P V of the
// last, and the exponentials hide behind P V: of this warpgroup, and of the
// other, which has nothing else to do.
#pragma once

#include "common/gemm.h"
#include "common/softmax.h"
#include "wide/traits.h"

namespace jax_fa3::wide {

// Of a lambda: a call, while a wgmma is in flight, would serialise all of them.
#define JAX_FA3_INLINE __attribute__((always_inline))

// O += P V of a warpgroup, 32 keys at a time.
template <class Traits>
struct OutGemm {
  using Storage = typename Traits::SharedStorage;
  typename Traits::MmaPV mma;
  Storage& storage;

  template <class Out>
  CUTLASS_DEVICE void issue(int buffer, int pair, int stage, Out& tOrO) const {
    Tensor tOrP = operand_a(mma, 0, storage.weights, typename Traits::LayoutP{});
    Tensor tOrV = operand_b(mma, 0, storage.ring, typename Traits::LayoutVt{});
    constexpr int kSteps = Traits::kKeysOfPiece / 16;
    Tensor piece = domain_offset(make_coord(_0{}, _0{}, pair * kSteps), tOrP(_, _, _, buffer));
    issue_gemm<kSteps>(mma, piece, tOrV(_, _, _, stage), tOrO);
  }
};

template <class Traits, class FindRows, class Out>
CUTLASS_DEVICE void mma_scores(fwd::Params const& params, typename Traits::SharedStorage& storage,
                               BlockRange const& blocks, FindRows const& find_rows,
                               Interval (&rows)[kRowsPerThread], Softmax& softmax, Out& tOrO) {
  using Element = typename Traits::Element;
  constexpr int kBlockN = Traits::kBlockN;
  typename Traits::MmaQK mma_qk;
  OutGemm<Traits> const out_gemm{{}, storage};
  Tensor tSrQ = operand_a(mma_qk, 0, storage.query, typename Traits::LayoutQ{});
  Tensor tSrK = operand_b(mma_qk, 0, storage.ring, typename Traits::LayoutK{});
  Tensor tSrS = partition_fragment_C(mma_qk, Shape<_64, Int<kBlockN>>{});
  int const lane = threadIdx.x % 32;
  int const warp_row = threadIdx.x % 128 / 32 * 16;
  Ring<Traits> ring{storage};
  int reading = 0;  // the stage that the wgmmas read which were issued last
  int buffer = 0;   // of P, that is written next

  // Behind the issue of the next wgmmas: those before are done.
  auto const finish_previous = [&] JAX_FA3_INLINE {
    warpgroup_wait<1>();
    ring.release(reading);
    reading = ring.state.stage;
    ring.state.advance();
  };
  auto const issue_first_scores = [&] JAX_FA3_INLINE {
    ring.wait();
    issue_gemm_zero(mma_qk, tSrQ(_, _, _, 0), tSrK(_, _, _, ring.state.stage), tSrS);
  };
  auto const issue_other_scores = [&] JAX_FA3_INLINE {
    CUTLASS_PRAGMA_NO_UNROLL
    for (int piece = 1; piece < Traits::kPiecesK; ++piece) {
      ring.wait();
      issue_gemm(mma_qk, tSrQ(_, _, _, piece), tSrK(_, _, _, ring.state.stage), tSrS);
      finish_previous();
    }
  };
  auto const issue_out = [&](int pair) JAX_FA3_INLINE {
    ring.wait();
    out_gemm.issue(buffer ^ 1, pair, ring.state.stage, tOrO);
    finish_previous();
    ring.pass();
  };
  auto const mask_block = [&](int n_block) JAX_FA3_INLINE {
    params.score.apply(tSrS);
    mask_scores(tSrS, rows, n_block * kBlockN + lane % 4 * 2);
  };
  auto const hand_over = [&] JAX_FA3_INLINE {
    named_sync(NamedBarrier::kWeightsEmpty, buffer, 256);
    auto const pair = [&](int i) { return pack<Element>(tSrS(2 * i), tSrS(2 * i + 1)); };
    stage_packed<Traits::kRows, kBlockN, 64>(pair, storage.weights + buffer * Traits::kSizeP,
                                             warp_row);
    if (lane % 4 == 0) {
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRowsPerThread; ++row) {
        storage.rows.rescale[buffer][warp_row + lane / 4 + row * 8] = softmax.rescale[row];
      }
    }
    cutlass::arch::fence_view_async_shared();
    named_sync(NamedBarrier::kWeightsWritten, 0, 128);
    named_arrive(NamedBarrier::kWeightsFull, buffer, 256);
    buffer ^= 1;
  };

  // The last block: nothing to overlap with.
  int n_block = blocks.end - 1;
  storage.query_full.wait(0);
  issue_first_scores();
  reading = ring.state.stage;
  ring.state.advance();
  clear(tOrO);
  find_rows(rows);
  issue_other_scores();
  warpgroup_wait<0>();
  warpgroup_fence_operand(tSrS);
  if (n_block < blocks.full_begin || n_block >= blocks.full_end) mask_block(n_block);
  softmax.update_max(tSrS);
  softmax.template exponentiate<0, 1>(tSrS);
  hand_over();
  --n_block;

  // S of block n, and P V of block n + 1.
  auto const step = [&](auto masked) JAX_FA3_INLINE {
    issue_first_scores();
    finish_previous();
    warpgroup_fence_operand(tOrO);
    softmax.rescale_out(tOrO);
    issue_other_scores();
    issue_out(0);
    warpgroup_fence_operand(tSrS);
    if constexpr (decltype(masked)::value) mask_block(n_block);
    softmax.update_max(tSrS);
    issue_out(1);
    softmax.template exponentiate<0, 2>(tSrS);
    issue_out(2);
    softmax.template exponentiate<1, 2>(tSrS);
    issue_out(3);
    hand_over();
    warpgroup_wait<0>();
    warpgroup_fence_operand(tOrO);
    --n_block;
  };
  while (n_block >= blocks.begin) {
    if (n_block < blocks.full_end) {
      while (n_block >= blocks.full_begin) step(false_type{});
    }
    if (n_block >= blocks.begin) step(true_type{});
  }

  warpgroup_wait<0>();
  warpgroup_fence_operand(tOrO);
  softmax.rescale_out(tOrO);
  CUTLASS_PRAGMA_UNROLL
  for (int pair = 0; pair < Traits::kPairsV; ++pair) issue_out(pair);
  warpgroup_wait<0>();
  warpgroup_fence_operand(tOrO);
  ring.release(reading);
}

template <class Traits, class Out>
CUTLASS_DEVICE void mma_values(typename Traits::SharedStorage& storage, BlockRange const& blocks,
                               Out& tOrO) {
  OutGemm<Traits> const out_gemm{{}, storage};
  int const row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;  // the thread's first
  Ring<Traits> ring{storage};
  int buffer = 0;
  named_arrive(NamedBarrier::kWeightsEmpty, 0, 256);
  named_arrive(NamedBarrier::kWeightsEmpty, 1, 256);
  clear(tOrO);
  ring.template pass<Traits::kPiecesK>();
  for (int n_block = blocks.end - 1; n_block >= blocks.begin; --n_block) {
    if (n_block > blocks.begin) ring.template pass<Traits::kPiecesK>();
    named_sync(NamedBarrier::kWeightsFull, buffer, 256);
    float const rescale[] = {storage.rows.rescale[buffer][row],
                             storage.rows.rescale[buffer][row + 8]};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); ++i) tOrO(i) *= rescale[fragment_row(i)];
    int reading = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int pair = 0; pair < Traits::kPairsV; ++pair) {
      ring.pass();
      ring.wait();
      out_gemm.issue(buffer, pair, ring.state.stage, tOrO);
      if (pair > 0) {
        warpgroup_wait<1>();
        ring.release(reading);
      }
      reading = ring.state.stage;
      ring.state.advance();
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(tOrO);
    ring.release(reading);
    named_arrive(NamedBarrier::kWeightsEmpty, buffer, 256);
    buffer ^= 1;
  }
}

}  // namespace jax_fa3::wide
