// A warpgroup's GEMMs, piece by piece, and the order of a step.
//
// S of step n comes before the gradient of step n - 1, so that the tensor cores have work while P
// or dS of step n is computed: a part of it behind each piece of the gradient.
//
// A warpgroup waits for its wgmmas of a piece, and releases it, before it waits for the next piece:
// what limits these kernels is the way of the pieces, and meanwhile the tensor cores have the other
// warpgroup's.
#pragma once

#include "common/gemm.h"
#include "wide_bwd/traits.h"

namespace jax_fa3::wide_bwd {

// Of a lambda: a call, while a wgmma is in flight, would serialise all of them.
#define JAX_FA3_INLINE __attribute__((always_inline))

template <class Traits>
struct Gemms {
  typename Traits::SharedStorage& storage;
  int warpgroup;
  int first;  // Place's
  typename Traits::MmaScores mma_scores;
  typename Traits::MmaGrad mma_grad;
  PipelineState<Traits::kStages> state;
  int buffer = 0;  // of the weights that are written next

  // The unit of a piece that this warpgroup reads.
  CUTLASS_DEVICE int unit() const {
    return Traits::kUnitsOfPiece * state.stage + (Traits::kUnitsOfPiece - 1) * warpgroup;
  }
  CUTLASS_DEVICE void wait() { storage.pieces.full[state.stage].wait(state.phase); }
  // The wgmmas of the piece are done.
  CUTLASS_DEVICE void finish() {
    warpgroup_wait<0>();
    storage.pieces.release(state.stage, first);
    state.advance();
  }

  template <class Scores>
  CUTLASS_DEVICE void compute_scores(Scores& scores) {
    uint16_t* const resident =
        storage.resident + (Traits::kTilesResident - 1) * warpgroup * Traits::kSizeTile;
    Tensor a = operand_a(mma_scores, 0, resident, typename Traits::LayoutResident{});
    Tensor b = operand_b(mma_scores, 0, storage.ring, typename Traits::LayoutScores{});
    wait();
    issue_gemm_zero(mma_scores, a(_, _, _, 0), b(_, _, _, unit()), scores);
    finish();
    CUTLASS_PRAGMA_NO_UNROLL
    for (int piece = 1; piece < Traits::kPiecesOfScores; ++piece) {
      wait();
      issue_gemm(mma_scores, a(_, _, _, piece), b(_, _, _, unit()), scores);
      finish();
    }
    warpgroup_fence_operand(scores);
  }

  template <class Grad>
  CUTLASS_DEVICE void issue_grad(int piece, Grad& grad) {
    Tensor a = operand_a(mma_grad, 0, storage.weights, typename Traits::LayoutWeights{});
    Tensor b = operand_b(mma_grad, 0, storage.ring, typename Traits::LayoutGrad{});
    // Of keys: those of all query rows, 64 in a unit; else those of this warpgroup's rows.
    int const slab =
        Traits::kOfKeys ? (buffer ^ 1) * 2 + piece * Traits::kRowsOfGrad / 64 : warpgroup;
    int const step = piece % (64 / Traits::kRowsOfGrad);
    Tensor weights = recomputed(a(_, _, step, slab));
    Tensor rows = recomputed(b(_, _, 0, unit()));
    wait();
    // Not by issue_gemm(): from so many places its lambda is called, not inlined.
    warpgroup_fence_operand(grad);
    warpgroup_arrive();
    cute::gemm(mma_grad, weights, rows, grad);
    warpgroup_commit_batch();
  }
};

// f(Int<0>{}), f(Int<1>{}), ...
template <class F, int... kPieces>
CUTLASS_DEVICE void unrolled(std::integer_sequence<int, kPieces...>, F const& f) {
  (f(Int<kPieces>{}), ...);
}

// All steps of one sum in the accumulators `grad`. `work` is one of the four kinds in weights.h:
//   next()       is there another step?
//   prepare()    S or dP is there, P or dS goes into this buffer
//   part<i>()    of its numbers becomes P or dS
//   hand_over()  all parts are done
//   take()       the weights for the gradient are to be there
template <class Work, class Scores, class Grad, class Gemms>
CUTLASS_DEVICE void run_steps(Work& work, Gemms& gemms, Scores& scores, Grad& grad) {
  constexpr int kPieces = Work::kPieces;
  gemms.compute_scores(scores);
  work.prepare(gemms.buffer);
  unrolled(std::make_integer_sequence<int, kPieces>{},
           [&](auto i) JAX_FA3_INLINE { work.template part<decltype(i)::value>(scores); });
  work.hand_over(gemms);
  while (work.next()) {
    gemms.compute_scores(scores);
    work.take();
    unrolled(std::make_integer_sequence<int, kPieces>{}, [&](auto i) JAX_FA3_INLINE {
      gemms.issue_grad(i, grad);
      if constexpr (decltype(i)::value == 0) work.prepare(gemms.buffer);
      work.template part<decltype(i)::value>(scores);
      gemms.finish();
    });
    warpgroup_fence_operand(grad);
    work.hand_over(gemms);
  }
  work.take();
  CUTLASS_PRAGMA_NO_UNROLL
  for (int piece = 0; piece < kPieces; ++piece) {
    gemms.issue_grad(piece, grad);
    gemms.finish();
  }
  warpgroup_fence_operand(grad);
}

}  // namespace jax_fa3::wide_bwd
