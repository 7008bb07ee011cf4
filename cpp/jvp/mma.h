// The mainloop of a consumer warpgroup: the forward's with three GEMMs for S and its tangent, and
// two for the tangent of O. Of the softmax nothing is left to find out: the forward has the
// log-sum-exp.
#pragma once

#include "common/gemm.h"
#include "jvp/scores.h"

namespace jax_fa3::jvp {

// Computes P dV + H V of one tile and the sums of H, from the last key block to the first.
// `find_rows` finds what is known of the thread's rows; it is called while the tensor cores compute
// the first S.
template <class Traits, class Turns, class FindRows, class Out>
CUTLASS_DEVICE void mma(Params const& params, typename Traits::SharedStorage& storage,
                        typename Traits::ConsumerState& state, Turns turns, WorkTile const& work,
                        FindRows const& find_rows, Interval (&intervals)[kRowsPerThread],
                        Rows& rows, Out& tOrO) {
  using Element = typename Traits::Element;
  BlockRange const& blocks = work.blocks;
  constexpr int kBlockN = Traits::kBlockN;
  typename Traits::template MmaScores<2 * kBlockN> mma_pair;
  typename Traits::template MmaScores<kBlockN> mma_key;
  typename Traits::MmaPV mma_pv;
  int const warpgroup = turns.warpgroup;
  using LayoutQ = typename Traits::LayoutQ;
  Tensor tSrQ = operand_a(mma_pair, warpgroup, storage.query, LayoutQ{})(_, _, _, 0);
  Tensor tSrdQ = operand_a(mma_key, warpgroup, storage.query_dot, LayoutQ{})(_, _, _, 0);
  Tensor tSrKdK = operand_b(mma_pair, warpgroup, storage.pairs, typename Traits::LayoutKeyPair{});
  Tensor tSrK = operand_b(mma_key, warpgroup, storage.pairs, typename Traits::LayoutKey{});
  Tensor tOrdVV = operand_b(mma_pv, warpgroup, storage.pairs, typename Traits::LayoutValuePair{});
  // S, behind it the tangent's part Q dK^T, and apart from them dQ K^T: wgmmas of two shapes cannot
  // follow each other into the same registers.
  constexpr Shape<Int<Traits::kBlockM>, Int<2 * kBlockN>> kShapePair{};
  Tensor tSdS = partition_fragment_C(mma_pair, kShapePair);
  Tensor tdS_Q = partition_fragment_C(mma_key, Shape<Int<Traits::kBlockM>, Int<kBlockN>>{});
  Tensor tS = make_tensor(tSdS.data(), tdS_Q.layout());
  Tensor tdS = make_tensor(tSdS.data() + size(tS), tdS_Q.layout());
  // P and H as an A operand: the same elements in the same order as in the accumulator.
  Tensor tOrPH = make_fragment_like<Element>(
      mma_pv.get_slice(warpgroup * 128).partition_A(make_tensor<Element>(kShapePair)));

  int const lane_column = threadIdx.x % 4 * 2;
  bool const elected = threadIdx.x % 32 == 0;
  auto& pairs = storage.pair_pipeline;
  using Position = decltype(state.pair);

  auto const issue_scores = [&](Position const& keys) {
    issue_gemm_zero(mma_pair, tSrQ, tSrKdK(_, _, _, keys.stage), tSdS);
    issue_gemm_zero(mma_key, tSrdQ, tSrK(_, _, _, keys.stage), tdS_Q);
  };
  auto const take_scores = [&] {
    warpgroup_fence_operand(tSdS);
    warpgroup_fence_operand(tdS_Q);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tdS); ++i) tdS(i) += tdS_Q(i);
  };
  auto const issue_out = [&](Position const& values) {
    issue_gemm(mma_pv, tOrPH, tOrdVV(_, _, _, values.stage), tOrO);
  };
  auto const next_pair = [&] {
    Position const position = state.pair;
    state.pair.advance();
    return position;
  };
  auto const wait = [&](Position const& position) {
    pairs.full[position.stage].wait(position.phase);
  };
  auto const release = [&](Position const& position) {
    if (elected) pairs.empty[position.stage].arrive();
  };
  // After the tile's last S, Q may be overwritten.
  auto const release_query = [&](int n_block) {
    if (elected && n_block == blocks.begin) storage.query_empty[warpgroup].arrive();
  };
  auto const mask_block = [&](int n_block) {
    cap_and_mask(params, intervals, n_block * kBlockN + lane_column, tS, tdS);
  };
  auto const convert = [&] {
    Tensor both = recast<uint32_t>(tOrPH);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(both); ++i) {
      both(i) = pack<Element>(tSdS(2 * i), tSdS(2 * i + 1));
    }
    rows.add_rounded<Element>(both);
  };

  // The last block: nothing to overlap with.
  int n_block = blocks.end - 1;
  storage.query_full[warpgroup].wait(state.query_phase);
  state.query_phase ^= 1;
  Position const first_keys = next_pair();
  wait(first_keys);
  turns.wait();
  issue_scores(first_keys);
  turns.pass();
  clear(tOrO);
  find_rows();
  warpgroup_wait<0>();
  take_scores();
  release(first_keys);
  if (n_block < blocks.full_begin || n_block >= blocks.full_end) mask_block(n_block);
  release_query(n_block);
  rows.probabilities(params, tS);
  rows.find_center(params, tS, tdS);
  rows.weigh(params, tS, tdS);
  convert();
  --n_block;

  // S of block n, while the tensor cores also compute P dV + H V of block n + 1.
  // A masked one finds a center, too, for rows that see nothing of the blocks before it.
  auto const step = [&](auto masked) {
    Position const keys = next_pair();
    Position const values = next_pair();
    wait(keys);
    turns.wait();
    issue_scores(keys);
    wait(values);
    issue_out(values);
    turns.pass();
    warpgroup_wait<1>();
    take_scores();
    release(keys);
    if constexpr (decltype(masked)::value) mask_block(n_block);
    rows.probabilities(params, tS);
    if constexpr (decltype(masked)::value) rows.find_center(params, tS, tdS);
    rows.weigh(params, tS, tdS);
    release_query(n_block);
    warpgroup_wait<0>();
    warpgroup_fence_operand(tOrO);
    release(values);
    convert();
  };
  while (n_block >= blocks.begin) {
    for (; n_block < blocks.full_end && n_block >= max(blocks.full_begin, blocks.begin);
         --n_block) {
      step(false_type{});
    }
    if (n_block >= blocks.begin) {
      step(true_type{});
      --n_block;
    }
  }

  Position const last_values = next_pair();
  wait(last_values);
  issue_out(last_values);
  warpgroup_wait<0>();
  warpgroup_fence_operand(tOrO);
  release(last_values);
}

}  // namespace jax_fa3::jvp
