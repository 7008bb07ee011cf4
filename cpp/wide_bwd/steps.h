// The steps of a cluster of dK's and dV's kernel: the blocks of query rows that see any of its
// keys, head by head of the KV head's group, of which each split (params.num_splits CTAs share
// them) has those of some heads, or an equal share.
#pragma once

#include <climits>

#include "bwd/params.h"
#include "bwd/traits.h"

namespace jax_fa3::wide_bwd {

// By one warp: load_step(step) for each, in order, and no_steps() if there is none.
template <class Traits, class LoadStep, class NoSteps>
CUTLASS_DEVICE void for_each_step(bwd::Params const& params, bwd::KeyTile const& tile,
                                  LoadStep const& load_step, NoSteps const& no_steps) {
  bwd::QueryBlock const* const blocks = params.blocks_of(tile.batch);
  int const lane = threadIdx.x % 32;
  int const first_key = tile.n_block * Traits::kBlockN;
  int const num_blocks = params.num_m_blocks;
  auto const sees_keys = [&](int index, bool exists) {
    if (!exists) return false;
    IntervalHull const& hull = blocks[index].hull;
    return hull.max_end > first_key && hull.min_begin < first_key + Traits::kBlockN;
  };
  // The blocks of a chunk that see keys, a bit for each: none where the hull of all does not.
  static_assert(kBlocksOfHull == 32, "a lane for each block");
  auto const seeing = [&](int chunk) {
    if (!sees_keys(num_blocks + chunk / kBlocksOfHull, true)) return 0u;
    return __ballot_sync(~0u, sees_keys(chunk + lane, chunk + lane < num_blocks));
  };

  int first_member = 0;
  int last_member = params.group;
  int skipped = 0;      // steps of first_member that belong to the split before
  int count = INT_MAX;  // of this split's steps
  if (params.num_splits > 1 && params.group % params.num_splits == 0) {
    int const members = params.group / params.num_splits;
    first_member = tile.split * members;
    last_member = first_member + members;
  } else if (params.num_splits > 1) {
    int of_head = 0;
    for (int chunk = 0; chunk < num_blocks; chunk += kBlocksOfHull)
      of_head += __popc(seeing(chunk));
    int64_t const all = int64_t{of_head} * params.group;
    int64_t const begin = all * tile.split / params.num_splits;
    int64_t const end = all * (tile.split + 1) / params.num_splits;
    first_member = of_head == 0 ? params.group : static_cast<int>(begin / of_head);
    skipped = of_head == 0 ? 0 : static_cast<int>(begin % of_head);
    count = static_cast<int>(end - begin);
  }

  // A step is loaded once the next is found: it must say whether it is the last.
  bwd::Step pending{-1, 0, true, true, true};
  // dK and dV leave the accumulators after so many steps (bwd/partial.h).
  int const most_steps = params.dkv_partial == nullptr ? INT_MAX : kMostRowsOfSum / Traits::kBlockM;
  int steps = 0;
  for (int member = first_member; member < last_member && count > 0; ++member) {
    int const head = tile.head_k * params.group + member;
    for (int chunk = 0; chunk < num_blocks && count > 0; chunk += kBlocksOfHull) {
      for (uint32_t bits = seeing(chunk); bits != 0; bits &= bits - 1) {
        if (skipped > 0) {
          --skipped;
          continue;
        }
        if (count-- == 0) break;
        if (pending.m_block >= 0) {
          pending.last = ++steps == most_steps;
          if (pending.last) steps = 0;
          load_step(pending);
        }
        pending = {chunk + __ffs(bits) - 1, head, true, false, false};
      }
    }
  }
  if (pending.m_block < 0) return no_steps(pending);
  pending.last = pending.ends = true;
  load_step(pending);
}

}  // namespace jax_fa3::wide_bwd
