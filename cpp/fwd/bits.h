// A dense mask in the forward's mainloop: which blocks of keys come, and what of them is seen.
#pragma once

#include "common/mask_bits.h"
#include "fwd/params.h"
#include "fwd/traits.h"

namespace jax_fa3::fwd {

// Where there is none: nothing.
template <class Traits, bool kHasBits = Traits::kHasBits>
struct DenseMask {
  CUTLASS_DEVICE DenseMask(Params const&, WorkTile const&, int) {}
  CUTLASS_DEVICE void load(int) {}
};

template <class Traits>
struct DenseMask<Traits, true> {
  BlockRange const& blocks;
  BlockWalk walk;
  BitsOfRows rows;
  uint32_t bits[kRowsPerThread];  // of the block that load() was for

  CUTLASS_DEVICE DenseMask(BitsParams const& params, WorkTile const& work, int warpgroup)
      : blocks(work.blocks),
        walk(params.bits, work.tile.batch, work.tile.head, work.tile.block, work.blocks.end),
        rows(params.bits, work.tile.batch, work.tile.head,
             work.tile.block * Traits::kBlockM + warpgroup * 64 + threadIdx.x % 128 / 32 * 16 +
                 threadIdx.x % 32 / 4) {}

  CUTLASS_DEVICE void load(int n_block) { rows.load(n_block, bits); }
  // Of the block that walk.next() gave.
  CUTLASS_DEVICE bool is_full(int n_block) const {
    return walk.full && n_block >= blocks.full_begin && n_block < blocks.full_end;
  }
  // How many blocks right below n_block, which is full, are full, too; walk passes over them.
  CUTLASS_DEVICE int take_run(int n_block) {
    int const bit = n_block % 32;
    uint32_t const below = bit == 0 ? 0 : (walk.bits.any & walk.bits.full) << (32 - bit);
    int const run = min(__clz(~below), n_block - max(blocks.full_begin, blocks.begin));
    walk.bits.any &= (1u << (bit - run)) - 1;
    return run;
  }
};

}  // namespace jax_fa3::fwd
