// The fused mainloop of a consumer warpgroup: dK and dV of its 64 keys, and its part of every dQ.
//
// Everything is transposed (keys are the rows of S^T), so that P^T and dS^T are A operands of dV
// and dK where they stand, in registers; only dS goes through shared memory, for dQ, which sums
// over the keys of both warpgroups. The exponentials of a step are computed while the tensor
// cores work on dQ of the step before (head dim 64) or on dP (128, where registers are fewer).
#pragma once

#include "bwd/alibi.h"
#include "bwd/bias.h"
#include "bwd/dropout.h"
#include "bwd/relative_bias.h"
#include "bwd/scores.h"
#include "bwd/traits.h"
#include "common/gemm.h"

namespace jax_fa3::bwd {

// S^T to P^T, once S^T is there. With a soft cap just to tanh, for dS takes both. There is none
// where a bias, or a term by distance, was added.
template <bool kIsBiased, class Records, class Scores>
CUTLASS_DEVICE void make_p(Params const& params, Records const& records, bool masked, Scores& tS) {
  warpgroup_fence_operand(tS);
  if (!kIsBiased && params.score.cap_scale != 0.f) {
    params.score.cap_all(tS);
  } else if (masked) {
    probabilities<true>(params, records, tS);
  } else {
    probabilities<false>(params, records, tS);
  }
}

// dP^T to dS^T, once dP^T is there; with a soft cap also what make_p() left to P^T.
template <bool kIsBiased, class Records, class Scores>
CUTLASS_DEVICE void make_ds(Params const& params, Records const& records, float scale, Scores& tS,
                            Scores& tdP) {
  warpgroup_fence_operand(tdP);
  if (!kIsBiased && params.score.cap_scale != 0.f) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tS); ++i) tdP(i) *= scale * Score::cap_grad(tS(i));
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tS); i += 4) {
      float2 const delta = records.delta_of(i);
      CUTLASS_PRAGMA_UNROLL
      for (int e = 0; e < 4; ++e) {
        tdP(i + e) -= Records::of(delta, e) * Score::cap_grad(tS(i + e));
      }
    }
    probabilities<true>(params, records, tS);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tS); ++i) tdP(i) *= tS(i);
  } else {
    score_grads(records, scale, tS, tdP);
  }
}

// make_ds() with dropout, of marked S^T, and what dV takes of P^T.
template <class Element, class Records, class Scores, class Packed>
CUTLASS_DEVICE void make_ds_and_p(DropoutParams const& params, Records const& records, float scale,
                                  Scores& tS, Scores& tdP, Packed& packed_p) {
  warpgroup_fence_operand(tdP);
  auto const scales = DropoutScales::of<Element>(params, scale);
  if (params.score.cap_scale != 0.f) {
    dropped_capped_score_grads(params, records, scales, tS, tdP);
  } else {
    dropped_score_grads(records, scales, tS, tdP);
  }
  copy(packed_left<Element>(tS), packed_p);
}

// A warpgroup's part of dS to shared memory, for dQ. There are two buffers, a step's is that of its
// stage: one is free again when the other warpgroup has written the other.
template <class Traits, class Packed>
CUTLASS_DEVICE void share_ds(typename Traits::SharedStorage& storage, int warpgroup, int stage,
                             Packed const& packed_ds) {
  stage_packed<Traits::kBlockN, Traits::kBlockM, 64>(packed_ds,
                                                     storage.exchange + stage * Traits::kSizedS,
                                                     warpgroup * 64 + threadIdx.x % 128 / 32 * 16);
  cutlass::arch::fence_view_async_shared();
  named_arrive(NamedBarrier::kDScoresWritten, warpgroup * 2 + stage, 256);
}

// A warpgroup's part of dQ to shared memory, from where write_dq() adds it to the sum.
template <class Traits, class dQuery>
CUTLASS_DEVICE void hand_over_dq(typename Traits::SharedStorage& storage, int warpgroup, int stage,
                                 dQuery& tdQ) {
  warpgroup_fence_operand(tdQ);
  named_sync(NamedBarrier::kDQueryEmpty, warpgroup, 128 + 32);
  auto* const part = reinterpret_cast<float4*>(storage.dquery + warpgroup * Traits::kSizedQ / 2) +
                     threadIdx.x % 128;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(tdQ); i += 4) {
    part[i / 4 * 128] = float4{tdQ(i), tdQ(i + 1), tdQ(i + 2), tdQ(i + 3)};
  }
  cutlass::arch::fence_view_async_shared();
  named_arrive(NamedBarrier::kDQueryFull, warpgroup * 2 + stage, 128 + 32);
}

// The bits of a dense mask for the thread's keys, from the step's first query row on.
template <class Traits>
CUTLASS_DEVICE void load_bits(BitsParams const& params, KeyTile const& tile, Step const& step,
                              int key, uint32_t (&bits)[kRowsPerThread]) {
  int const row = step.m_block * Traits::kBlockM;
  BitsOfRows(params.bits, tile.batch, step.head, key).load(row / kMaskBlock, bits);
  if constexpr (Traits::kBlockM < kMaskBlock) {
    CUTLASS_PRAGMA_UNROLL
    for (uint32_t& of_key : bits) of_key >>= row % kMaskBlock / 8 * 2;
  }
}

// The steps of one sum of dK and dV in the accumulators (Step::last). Returns whether they are the
// tile's last.
template <class Traits, class State, class BiasState, class dKey, class dValue>
CUTLASS_DEVICE bool mma(typename Traits::Params const& params,
                        typename Traits::SharedStorage& storage, KeyTile const& tile,
                        uint32_t& key_phase, int warpgroup, State& state, BiasState& bias_state,
                        float scale, dKey& tdK, dValue& tdV) {
  using Element = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  typename Traits::template MmaScores<Traits::kHeadDim> mma_s;
  typename Traits::template MmaScores<Traits::kHeadDimV> mma_dp;
  typename Traits::template MmaGrad<Traits::kHeadDim> mma_dk;
  typename Traits::template MmaGrad<Traits::kHeadDimV> mma_dv;
  typename Traits::MmadQ mma_dq;
  auto const a = [&](auto const& mma, uint16_t* smem, auto layout) {
    return operand_a(mma, warpgroup, smem, layout);
  };
  auto const b = [&](auto const& mma, uint16_t* smem, auto layout) {
    return operand_b(mma, warpgroup, smem, layout);
  };
  Tensor tSrK = a(mma_s, storage.key, typename Traits::LayoutK{})(_, _, _, 0);
  Tensor tSrQ = b(mma_s, storage.query, typename Traits::LayoutQ{});
  Tensor tdPrV =
      operand_a(mma_dp, warpgroup, storage.value, typename Traits::LayoutV{})(_, _, _, 0);
  Tensor tdPrdO = b(mma_dp, storage.dout, typename Traits::LayoutdO{});
  typename Traits::template MmaGradInSlabs<Traits::kHeadDimV> const dv_in_slabs;
  typename Traits::template MmaGradInSlabs<Traits::kHeadDim> const dk_in_slabs;
  Tensor tdVrdO = b(dv_in_slabs, storage.dout, typename Traits::LayoutdOt{});
  Tensor tdKrQ = b(dk_in_slabs, storage.query, typename Traits::LayoutQt{});
  Tensor tdQrdS = a(mma_dq, storage.exchange, typename Traits::LayoutdS{});
  Tensor tdQrK =
      b(typename Traits::MmadQInSlabs{}, storage.key, typename Traits::LayoutKt{})(_, _, _, 0);

  constexpr Shape<Int<kBlockN>, Int<kBlockM>> kShapeS{};
  Tensor tS = partition_fragment_C(mma_s, kShapeS);
  Tensor tdP = partition_fragment_C(mma_dp, kShapeS);
  Tensor tdQ = partition_fragment_C(mma_dq, Shape<Int<kBlockM>, Int<Traits::kHeadDim>>{});
  Tensor tdVrP = make_fragment_like<Element>(
      mma_dv.get_slice(warpgroup * 128).partition_A(make_tensor<Element>(kShapeS)));
  Tensor tdKrdS = make_fragment_like<Element>(tdVrP);
  static_assert(size(tdVrP) == size(tS));
  Tensor packed_p = recast<uint32_t>(tdVrP);
  Tensor packed_ds = recast<uint32_t>(tdKrdS);

  int const key =
      tile.n_block * kBlockN + warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  bool const elected = threadIdx.x % 32 == 0;
  auto& queries = storage.query_pipeline;
  auto& douts = storage.dout_pipeline;
  Step step;

  auto const issue_s = [&] {
    if constexpr (Traits::kHasAlibi) {
      typename Traits::MmaTerm const mma_term;
      Term const term{mma_term,
                      a(mma_term, storage.term_keys, typename Traits::LayoutTermKeys{})(_, _, _, 0),
                      b(mma_term, storage.term_queries, typename Traits::LayoutTermQueries{})(
                          _, _, _, state.stage)};
      issue_scores_with_term<Traits::kHeadDim / 16>(mma_s, tSrK, tSrQ(_, _, _, state.stage), term,
                                                    tS);
    } else {
      issue_gemm_zero<Traits::kHeadDim / 16>(mma_s, tSrK, tSrQ(_, _, _, state.stage), tS);
    }
  };
  auto const issue_dp = [&] {
    douts.full[state.stage].wait(state.phase);
    issue_gemm_zero<Traits::kHeadDimV / 16>(mma_dp, tdPrV, tdPrdO(_, _, _, state.stage), tdP);
  };
  auto const issue_dv = [&](int stage) { issue_gemm(mma_dv, tdVrP, tdVrdO(_, _, _, stage), tdV); };
  auto const issue_dk = [&](int stage) { issue_gemm(mma_dk, tdKrdS, tdKrQ(_, _, _, stage), tdK); };
  // dQ = dS K, as soon as the other warpgroup has written its part of dS, too.
  auto const issue_dq = [&](int stage) {
    named_sync(NamedBarrier::kDScoresWritten, (1 - warpgroup) * 2 + stage, 256);
    issue_gemm_zero(mma_dq, tdQrdS(_, _, _, stage), tdQrK, tdQ);
  };
  uint32_t bits[kRowsPerThread];  // of a dense mask, in a step that is masked
  constexpr bool kIsBiased = Traits::kHasBias || Traits::kHasAlibi || Traits::kHasRelative;
  // With terms by distance: of the thread's first key from its first row. From memory, for
  // registers are few.
  [[maybe_unused]] auto const distance = [&] {
    int const m_block = storage.steps[state.stage].m_block;
    return key - m_block * kBlockM - static_cast<int>(threadIdx.x % 4) * 2;
  };
  auto const records = [&] {
    RowRecords<kBlockM> const rows{storage.stats + state.stage * RowStats<kBlockM>::kSize,
                                   storage.intervals + state.stage * kBlockM, key};
    if constexpr (Traits::kHasBits) {
      return RowRecordsWithBits<kBlockM>{rows, bits};
    } else {
      return rows;
    }
  };
  auto const read_step = [&] {
    queries.full[state.stage].wait(state.phase);
    step = storage.steps[state.stage];
    step.masked |= records().careful();
  };
  // Late, when there are registers for them.
  auto const load_bits_of_step = [&] {
    if constexpr (Traits::kHasBits) {
      if (step.masked) load_bits<Traits>(params, tile, step, key, bits);
    }
  };
  auto const take_next = [&] {
    state.advance();
    read_step();
  };
  // P^T and dS^T as A operands of dV and dK.
  auto const make_operands = [&] {
    if constexpr (Traits::kHasDropout) {
      make_ds_and_p<Element>(params, records(), scale, tS, tdP, packed_p);
    } else {
      make_ds<kIsBiased>(params, records(), scale, tS, tdP);
      copy(packed<Element>(tS), packed_p);
    }
    if constexpr (Traits::kHasBias) {
      add_dbias(params, tile.batch, step.head, step.m_block * kBlockM, key, scale, tdP);
    }
    copy(packed<Element>(tdP), packed_ds);
    if constexpr (Traits::kHasAlibi) {
      int const head = storage.steps[state.stage].head;
      add_dalibi<Traits>(params, tile, head, distance(), scale, packed_ds);
    }
    if constexpr (Traits::kHasRelative) {
      Step const& place = storage.steps[state.stage];
      add_drelative<Traits>(params, tile, place.head, key - static_cast<int>(threadIdx.x % 32 / 4),
                            place.m_block * kBlockM, scale, packed_ds);
    }
  };
  auto const make_probabilities = [&] {
    if constexpr (Traits::kHasBias) {
      warpgroup_fence_operand(tS);
      add_bias_transposed<Element>(params.bias, storage.bias_rings[warpgroup],
                                   storage.bias(warpgroup), bias_state, tS);
    }
    if constexpr (Traits::kHasRelative) {
      warpgroup_fence_operand(tS);
      RelativeTerms<kBlockM, -1> relative;
      relative.load(params.relative_bias, tile.batch, storage.steps[state.stage].head, distance());
      relative.add(tS);
    }
    make_p<kIsBiased>(params, records(), step.masked, tS);
    if constexpr (Traits::kHasDropout && Traits::kNarrow) {
      mark_dropped(params, storage.dropout_states(state.stage), warpgroup,
                   multiplier_of_key(params.dropout, key), tS);
    }
  };
  // While dP's GEMM runs: the branch, always taken, keeps ptxas from waiting for that first. At
  // head dim 64 there are too few registers.
  auto const mark_during_dp = [&] {
    if constexpr (Traits::kHasDropout && !Traits::kNarrow) {
      if (params.dropout.scale > 0.f) {
        mark_dropped(params, storage.dropout_states(state.stage), warpgroup,
                     multiplier_of_key(params.dropout, key), tS);
      }
    }
  };
  auto const release_dout = [&](int stage) {
    warpgroup_fence_operand(tdV);
    if (elected) douts.empty[stage].arrive();
  };
  auto const release_query = [&](int stage) {
    warpgroup_fence_operand(tdK);
    if (elected) queries.empty[stage].arrive();
  };

  // In tiles of splits one turn a tile is slower than one a step: 71 heads of 64 on one, 4 x 2048,
  // 1030 us instead of 920.
  bool const turn_of_step = Traits::kNarrow && params.num_splits > 1;

  // The steps stand here one after the other: as functions of their own they became other, longer
  // machine code. First S and dP of the first.
  read_step();
  if (step.m_block < 0) {
    if constexpr (Traits::kPersistent) {
      if constexpr (kKeysFirst<Traits>) {
        storage.key_full.wait(key_phase);
        storage.value_full.wait(key_phase);
        key_phase ^= 1;
        if (elected) storage.keys_empty.arrive();
      }
      if (elected) {
        douts.empty[state.stage].arrive();
        queries.empty[state.stage].arrive();
      }
      state.advance();
    }
    return true;
  }
  storage.key_full.wait(key_phase);
  // One warpgroup begins a tile later, so that from the first step on its exponentials are computed
  // while the other's GEMMs run, and the other way round.
  constexpr bool kTurns = Traits::kNarrow || Traits::kPersistent;
  bool const turn_of_tile = kTurns && !turn_of_step;
  if (turn_of_tile && warpgroup == 1) named_sync(NamedBarrier::kTurn, 0, 256);
  issue_s();
  storage.value_full.wait(key_phase);
  issue_dp();
  load_bits_of_step();
  warpgroup_wait<1>();
  make_probabilities();
  if constexpr (kTurns) {
    named_arrive_if(turn_of_tile && warpgroup == 0, NamedBarrier::kTurn, 0, 256);
  }
  mark_during_dp();
  warpgroup_wait<0>();
  make_operands();
  if constexpr (Traits::kNarrow) share_ds<Traits>(storage, warpgroup, state.stage, packed_ds);
  if (turn_of_step && warpgroup == 1) named_arrive(NamedBarrier::kTurn, 0, 256);

  // dV, dK and dQ of a step, S and dP of the next. Nothing is in flight between iterations.
  while (!step.last) {
    int const last_stage = state.stage;
    if constexpr (Traits::kNarrow) {
      // dQ waits for the other warpgroup last, behind all that does not, and runs while the
      // exponentials are computed.
      if (turn_of_step) named_sync(NamedBarrier::kTurn, warpgroup, 256);
      issue_dv(last_stage);
      issue_dk(last_stage);
      take_next();
      warpgroup_wait<1>();
      release_dout(last_stage);
      issue_s();
      named_arrive_if(turn_of_step, NamedBarrier::kTurn, 1 - warpgroup, 256);
      issue_dq(last_stage);
      load_bits_of_step();
      warpgroup_wait<1>();
      release_query(last_stage);
      make_probabilities();
      warpgroup_wait<0>();
      hand_over_dq<Traits>(storage, warpgroup, last_stage, tdQ);
      issue_dp();
    } else {
      // Fewer registers: dQ has left them when S comes. dP runs while the exponentials are
      // computed.
      issue_dv(last_stage);
      share_ds<Traits>(storage, warpgroup, last_stage, packed_ds);
      issue_dq(last_stage);
      issue_dk(last_stage);
      warpgroup_wait<1>();
      release_dout(last_stage);
      take_next();
      hand_over_dq<Traits>(storage, warpgroup, last_stage, tdQ);
      issue_s();
      warpgroup_wait<1>();
      release_query(last_stage);
      load_bits_of_step();
      issue_dp();
      warpgroup_wait<1>();
      make_probabilities();
      mark_during_dp();
    }
    warpgroup_wait<0>();
    make_operands();
    // A fence waits for the wgmmas in flight: here there are none.
    if constexpr (Traits::kNarrow) share_ds<Traits>(storage, warpgroup, state.stage, packed_ds);
  }

  // dV, dK and dQ of the last.
  issue_dv(state.stage);
  if constexpr (!Traits::kNarrow) share_ds<Traits>(storage, warpgroup, state.stage, packed_ds);
  issue_dq(state.stage);
  issue_dk(state.stage);
  warpgroup_wait<1>();
  if constexpr (Traits::kPersistent) {
    if (step.ends) {
      if (elected) storage.keys_empty.arrive();
      key_phase ^= 1;
    }
  }
  hand_over_dq<Traits>(storage, warpgroup, state.stage, tdQ);
  warpgroup_wait<0>();
  release_dout(state.stage);
  release_query(state.stage);
  state.advance();
  if (turn_of_step && warpgroup == 0) named_sync(NamedBarrier::kTurn, 0, 256);  // nobody else does
  return step.ends;
}

}  // namespace jax_fa3::bwd
