// Whose turn it is to add to dQ, where the sum shall be the same in every run.
//
// Key block j walks over the query blocks from its own place on, round the end: at step t it is at
// block start(j) + t, where no other of its head is. Additions to a query block are in the order of
// t. Whoever waits, waits for a key block that is at an earlier step, so all get on, whichever
// blocks a mask leaves out, as long as they run at the same time. Hence groups, one after the
// other, that are sure to do that.
#pragma once

#include "common/mask.h"

namespace jax_fa3::bwd {

struct Turns {
  int num_m_blocks;  // of query rows
  int shift;         // key blocks start 2^shift query blocks apart
  int group;         // key blocks of a group, whose CTAs wait for each other

  // Spreads the starts over all query blocks, or half of them at least: a power of two apart, for
  // registers are few where this is used.
  //
  // A group takes half of the SMs at most: two such kernels may run side by side, but not three.
  static constexpr Turns of(int num_m_blocks, int num_n_blocks, int num_sms) {
    int group = 1;
    while (group < 64 && group * 4 <= num_sms) group *= 2;
    int64_t const enough = int64_t{num_m_blocks} + num_m_blocks / 8;
    int shift = -31;
    while (shift < 30 && spread(num_n_blocks, shift + 1) <= enough) ++shift;
    return {num_m_blocks, shift, group};
  }

  // The query block with which a key block begins.
  JAX_FA3_HOST_DEVICE int start(int n_block) const {
    int64_t const block = spread(n_block, shift);
    return block < num_m_blocks ? static_cast<int>(block) : num_m_blocks - 1;
  }

  // How many add to a query block before `n_block` does; those from `first` to `end` - 1 do it.
  JAX_FA3_HOST_DEVICE int before(int m_block, int n_block, int first, int end) const {
    int const group_begin = n_block & -group;  // a power of two
    int const low = group_begin > first ? group_begin : first;
    int const high = group_begin + group < end ? group_begin + group : end;
    // First those that have begun at or before m_block, the last of them first; then the others,
    // likewise.
    int64_t const begun = m_block + 1 >= num_m_blocks ? high
                          : shift >= 0                ? (m_block >> shift) + 1
                                                      : spread(m_block + 1, -shift);
    int const middle = begun < low ? low : (begun < high ? static_cast<int>(begun) : high);
    return low - first +
           (n_block < middle ? middle - 1 - n_block : middle - low + high - 1 - n_block);
  }

 private:
  JAX_FA3_HOST_DEVICE static constexpr int64_t spread(int64_t block, int shift) {
    return shift >= 0 ? block << shift : block >> -shift;
  }
};

}  // namespace jax_fa3::bwd
