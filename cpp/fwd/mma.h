// The mainloop of a consumer warpgroup.
//
// Two overlaps hide the exponentials behind the tensor cores (FlashAttention-3, section 3): the
// warpgroups take turns (ping-pong), and within one warpgroup S of the next block is computed
// together with P V of the last, whose softmax is already done.
#pragma once

#include "common/gemm.h"
#include "common/softmax.h"
#include "fwd/bits.h"
#include "fwd/long_sums.h"
#include "fwd/params.h"
#include "fwd/query.h"
#include "fwd/traits.h"

namespace jax_fa3::fwd {

// What a step is: of a full block, or of one that is masked; whether a bias by distance is added to
// its scores; whether its P V is that of the rest of the keys (Kind::kRest).
enum StepKind : int { kFullBlock = 0, kMaskedBlock = 1, kAddsTerm = 2, kBehindRest = 4 };

// Computes O (not yet divided by the row sums) and the softmax statistics of one tile, from the
// last key block to the first. `find_rows` finds the intervals of the thread's rows, `end_rows`
// does what can be done once their sums are known; they are called while the tensor cores compute
// the first S and the last P V.
template <class Traits, class Turns, class FindRows, class EndRows, class Out>
CUTLASS_DEVICE void mma(typename Traits::Params const& params,
                        typename Traits::SharedStorage& storage,
                        typename Traits::ConsumerState& state, Turns turns, WorkTile const& work,
                        FindRows const& find_rows, Interval (&rows)[kRowsPerThread],
                        typename Traits::Softmax& softmax, EndRows const& end_rows, Out& tOrO) {
  using Element = typename Traits::Element;
  BlockRange const& blocks = work.blocks;
  constexpr int kBlockN = Traits::kBlockN;

  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  int const warpgroup = turns.warpgroup;
  auto const memory = [](uint16_t* p) { return make_smem_ptr(reinterpret_cast<Element*>(p)); };
  Tensor sQ = make_tensor(memory(storage.query), typename Traits::LayoutQ{});
  Tensor sK = make_tensor(memory(storage.key), typename Traits::LayoutK{});
  Tensor sVt = make_tensor(memory(storage.value), typename Traits::LayoutVt{});
  // The warpgroup's first thread stands for all: descriptors are the same across a warpgroup. (Made
  // by operand_a() and operand_b() they are the same, but the machine code of a kernel is not.)
  auto const group_qk = mma_qk.get_slice(warpgroup * 128);
  auto tSrQ = [&] {
    if constexpr (Traits::kQueryInRegisters) {
      return query_registers<Element, Traits::kBlockM, Traits::kHeadDim>(group_qk);
    } else {
      return group_qk.partition_fragment_A(sQ)(_, _, _, 0);
    }
  }();
  Tensor tSrK = group_qk.partition_fragment_B(sK);
  Tensor tOrV =
      typename Traits::MmaPVInSlabs{}.get_slice(warpgroup * 128).partition_fragment_B(sVt);
  Tensor tSrS = partition_fragment_C(mma_qk, Shape<Int<Traits::kBlockM>, Int<kBlockN>>{});
  // P as the A operand of P V: the same elements in the same order as S in the accumulator.
  Tensor tOrP = make_fragment_like<Element>(
      mma_pv.get_slice(warpgroup * 128)
          .partition_A(make_tensor<Element>(Shape<Int<Traits::kBlockM>, Int<kBlockN>>{})));
  static_assert(size(tOrP) == size(tSrS));

  int const lane_column = threadIdx.x % 4 * 2;
  bool const elected = threadIdx.x % 32 == 0;
  auto& keys = storage.key_pipeline;
  auto& values = storage.value_pipeline;

  auto const issue_scores = [&] {
    if constexpr (Traits::kHasAlibi) {
      typename Traits::MmaTerm const mma_term;
      Term const term{mma_term,
                      operand_a(mma_term, warpgroup, storage.term_rows(),
                                typename Traits::LayoutTermRows{})(_, _, _, 0),
                      operand_b(mma_term, warpgroup, storage.term_keys(),
                                typename Traits::LayoutTermKeys{})(_, _, _, state.key.stage)};
      issue_scores_with_term<Traits::kHeadDim / 16>(mma_qk, tSrQ, tSrK(_, _, _, state.key.stage),
                                                    term, tSrS);
    } else {
      issue_gemm_zero<Traits::kHeadDim / 16>(mma_qk, tSrQ, tSrK(_, _, _, state.key.stage), tSrS);
    }
  };
  auto const issue_out = [&] { issue_gemm(mma_pv, tOrP, tOrV(_, _, _, state.value.stage), tOrO); };
  auto const release = [&](auto& pipeline, auto& position) {
    if (elected) pipeline.empty[position.stage].arrive();
    position.advance();
  };
  // After the tile's last S, Q may be overwritten: at once if it is in registers.
  auto const release_query = [&](int n_block) {
    if (Traits::kQueryInRegisters) return;
    if (elected && n_block == blocks.begin) storage.query_empty[warpgroup].arrive();
  };
  auto const wait_for_query = [&] {
    storage.query_full[warpgroup].wait(state.query_phase);
    state.query_phase ^= 1;
    if constexpr (Traits::kQueryInRegisters) {
      load_query<Traits::kBlockM, Traits::kSlab>(storage.query, warpgroup * 64, tSrQ);
      __syncwarp();
      if (elected) storage.query_empty[warpgroup].arrive();
    }
  };
  int n_block = blocks.end - 1;
  [[maybe_unused]] RelativeTerms<kBlockN, 1, Traits::kTermsAtOnce> relative;
  auto const load_relative = [&] {
    if constexpr (Traits::kHasRelative) {
      int const row = work.tile.block * Traits::kBlockM + warpgroup * 64 +
                      threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
      relative.load(params.relative_bias, work.tile.batch, work.tile.head,
                    n_block * kBlockN + lane_column - row);
    }
  };
  auto const load_terms = [&](auto has_term) {
    if constexpr (decltype(has_term)::value && !Traits::kLoadsTermsLate) load_relative();
  };
  auto const add_terms = [&](auto has_term) {
    if constexpr (decltype(has_term)::value) {
      if constexpr (Traits::kLoadsTermsLate) load_relative();
      relative.add(tSrS);
    }
  };
  auto const take_scores = [&] {
    warpgroup_fence_operand(tSrS);
    release(keys, state.key);
    if constexpr (Traits::kHasBias) {
      add_bias<Element>(params.bias, storage.bias_rings[warpgroup], storage.bias(warpgroup),
                        state.bias, tSrS);
    }
  };
  DenseMask<Traits> dense(params, work, warpgroup);
  auto const mask_block = [&](int n_block) {
    if constexpr (!Traits::kHasBias && !Traits::kHasAlibi && !Traits::kHasRelative) {
      params.score.apply(tSrS);
    }
    if constexpr (Traits::kHasBits) {
      mask_scores(tSrS, rows, n_block * kBlockN + lane_column, dense.bits);
    } else if constexpr (!Traits::kMasksFirstAlone) {
      mask_scores(tSrS, rows, n_block * kBlockN + lane_column);
    }
  };
  [[maybe_unused]] uint2 dropout_head;
  [[maybe_unused]] uint32_t dropout_quad, dropout_rows;
  if constexpr (Traits::kHasDropout) {
    int const row = work.tile.block * Traits::kBlockM + warpgroup * 64;
    dropout_rows = dropout_pair(row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
    dropout_quad = params.dropout.quads[threadIdx.x % 4];
    dropout_head = params.dropout.of_head(work.tile.batch * params.num_heads_q + work.tile.head);
  }
  auto const convert = [&] {
    Tensor packed = recast<uint32_t>(tOrP);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(packed); ++i) {
      packed(i) = pack<Element>(tSrS(2 * i), tSrS(2 * i + 1));
    }
    if constexpr (Traits::kHasDropout) {
      drop_packed<kBlockN>(params.dropout, dropout_head, dropout_quad, n_block, dropout_rows,
                           packed);
    }
  };

  // The last block: nothing to overlap with.
  if constexpr (Traits::kHasBits) dense.load(dense.walk.next());
  wait_for_query();
  keys.full[state.key.stage].wait(state.key.phase);
  turns.wait();
  if constexpr (Traits::kHasRest) {
    // Of the rest of the keys alone.
    typename Traits::MmaRest mma_rest;
    Tensor rest = partition_fragment_C(mma_rest, Shape<Int<Traits::kBlockM>, Int<kRestKeys>>{});
    issue_gemm_zero<Traits::kHeadDim / 16>(mma_rest, tSrQ, tSrK(_, _, _, state.key.stage), rest);
    turns.pass();
    clear(tOrO);
    find_rows(rows);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rest);
    release(keys, state.key);
    mask_scores(rest, rows, n_block * kBlockN + lane_column);
    softmax.template update_max<Traits::kMaxOfThree>(rest);
    softmax.template exponentiate<0, 1>(rest);
    Tensor packed = recast<uint32_t>(tOrP);  // of which P V reads the first kRestKeys
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(packed); ++i) {
      packed(i) = i < size(rest) / 2 ? pack<Element>(rest(2 * i), rest(2 * i + 1)) : 0;
    }
  } else {
    issue_scores();
    turns.pass();
    clear(tOrO);
    find_rows(rows);
    constexpr bool_constant<Traits::kHasRelative> has_term{};
    load_terms(has_term);
    warpgroup_wait<0>();
    take_scores();
    add_terms(has_term);
    bool is_full = n_block >= blocks.full_begin && n_block < blocks.full_end;
    if constexpr (Traits::kHasBits) is_full = dense.is_full(n_block);
    if (!Traits::kByParts && !is_full) mask_block(n_block);
    if (!Traits::kByParts || is_full) {
      softmax.template update_max<Traits::kMaxOfThree>(tSrS);
      release_query(n_block);
      softmax.template exponentiate<0, 1>(tSrS);
    } else if constexpr (Traits::kByParts) {
      if constexpr (!Traits::kHasBias && !Traits::kHasAlibi && !Traits::kHasRelative) {
        params.score.apply(tSrS);
      }
      FirstBlock<kBlockN>{rows}.exponentiate(rows, n_block * kBlockN, softmax, tSrS,
                                             [&] { release_query(n_block); });
    }
    convert();
  }

  // S of block n, while the tensor cores also compute P V of block n + 1.
  bool key_is_there = false;  // asked for amid the exponentials: an answer takes 90 clocks
  auto const step = [&](auto of_kind) {
    constexpr int kKind = decltype(of_kind)::value;
    constexpr bool kMasked = (kKind & kMaskedBlock) != 0;
    constexpr bool_constant<(kKind & kAddsTerm) != 0> has_term{};
    // Rows may see their first key in a masked block: there, offsets would rarely stay.
    constexpr bool kKeepsOffset = Traits::kKeepsOffset && !kMasked;
    if constexpr (kMasked) dense.load(n_block);
    if (!key_is_there) keys.full[state.key.stage].wait(state.key.phase);
    turns.wait();
    issue_scores();
    values.full[state.value.stage].wait(state.value.phase);
    if constexpr ((kKind & kBehindRest) != 0) {
      issue_gemm<kRestKeys / 16>(mma_pv, tOrP, tOrV(_, _, _, state.value.stage), tOrO);
    } else {
      issue_out();
    }
    load_terms(has_term);
    warpgroup_wait<1>();
    turns.pass();
    take_scores();
    add_terms(has_term);
    if constexpr (kMasked) mask_block(n_block);
    bool rescales = true;
    if constexpr (kKeepsOffset) {
      rescales = softmax.raise_offset(tSrS);
    } else {
      softmax.template update_max<Traits::kMaxOfThree>(tSrS);
    }
    softmax.template exponentiate<0, 2>(tSrS);
    release_query(n_block);
    // P V was issued right behind S and takes as long: it is done amid the exponentials. ptxas
    // would wait for it before them, if it could, and for the barrier's answer first of all; so
    // what is asked depends on their sum, which is never negative.
    if constexpr (Traits::kKeepsOffset) {
      uint32_t const never = __any_sync(~0u, softmax.row_sum[1] < 0.f);
      key_is_there = keys.full[state.key.stage].test_wait(state.key.phase ^ never);
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(tOrO);
    release(values, state.value);
    softmax.template exponentiate<1, 2>(tSrS);
    convert();
    // Here and not where offsets are raised: warps do that apart, and all of a warpgroup must wait
    // for a wgmma by one and the same instruction.
    if (rescales) softmax.rescale_out(tOrO);
  };
  LongSums<Traits> long_sums{params, warpgroup, blocks.end};
  if constexpr (Traits::kKeysStay) {
    // There is one block.
  } else if constexpr (Traits::kHasRest) {
    --n_block;
    step(Int<kBehindRest>{});
    for (--n_block; n_block >= blocks.begin; --n_block) step(Int<kFullBlock>{});
  } else if constexpr (Traits::kMasksFirstAlone) {
    for (--n_block; n_block >= blocks.begin; --n_block) step(Int<kFullBlock>{});
  } else if constexpr (Traits::kHasBits) {
    while (n_block > blocks.begin) {
      n_block = dense.walk.next();
      if (dense.is_full(n_block)) {
        int const first = n_block - dense.take_run(n_block);
        do {
          step(Int<kFullBlock>{});
        } while (n_block-- > first);
        n_block = first;
      } else {
        step(Int<kMaskedBlock>{});
      }
    }
  } else if constexpr (Traits::kHasRelative) {
    // Of blocks where all scores get the same nothing is added to any: the softmax does as if it
    // had been.
    float added = 0.f;
    auto const have_added = [&](float same) {
      softmax.count_from(same - added);
      added = same;
    };
    for (--n_block; n_block >= blocks.begin; --n_block) {
      if (!key_is_there) keys.full[state.key.stage].wait(state.key.phase);
      key_is_there = true;
      float const same = storage.same_term()[state.key.stage];
      bool const is_full = n_block >= blocks.full_begin && n_block < blocks.full_end;
      if (is_full && !isnan(same)) {
        if (same != added) have_added(same);
        step(Int<kFullBlock>{});
      } else {
        if (added != 0.f) have_added(0.f);
        if (is_full) {
          step(Int<kAddsTerm>{});
        } else {
          step(Int<(kMaskedBlock | kAddsTerm)>{});
        }
      }
    }
    have_added(0.f);
  } else {
    --n_block;
    while (n_block >= blocks.begin) {
      if (n_block < blocks.full_end) {
        int const first = long_sums.first_block(blocks.full_begin);
        for (; n_block >= first; --n_block) step(Int<kFullBlock>{});
      }
      if (long_sums.is_full(n_block)) {
        long_sums.accumulate(softmax, tOrO);
      } else if (n_block >= blocks.begin) {
        step(Int<kMaskedBlock>{});
        --n_block;
      }
    }
  }

  if constexpr (Traits::kKeepsOffset) softmax.join_max();
  values.full[state.value.stage].wait(state.value.phase);
  issue_out();
  if constexpr (Traits::kEndsRowsEarly) end_rows();
  warpgroup_wait<0>();
  warpgroup_fence_operand(tOrO);
  release(values, state.value);
  long_sums.finish(softmax, tOrO);
  if constexpr (!Traits::kEndsRowsEarly) end_rows();
}

}  // namespace jax_fa3::fwd
