// A dense mask as the kernels read it: one bit a score, and of each block of scores whether anybody
// sees any of it, and whether everybody sees all (mask_bits.h makes them of a bool array).
//
// Bits lie as a thread holds its scores: of 128 columns of a row a thread has those that are 2 q
// and 2 q + 1 of each 8, q = lane % 4, so they are one word, which four lanes read as 16 bytes. The
// forward's rows are query rows, its columns keys; in the backward it is the other way round.
#pragma once

#include "common/softmax.h"
#include "problem.h"

namespace jax_fa3 {

// Of 32 blocks of columns in a block of rows, a bit each.
struct BlockBits {
  uint32_t any;
  uint32_t full;
};

CUTLASS_DEVICE BlockBits block_bits(MaskBits const& mask, int batch, int head, int row_block,
                                    int word) {
  int64_t const index = batch * mask.blocks_of_batch + head * mask.blocks_of_head +
                        row_block * mask.blocks_of_row + word * mask.blocks_of_word;
  uint2 const bits = __ldg(reinterpret_cast<uint2 const*>(mask.blocks) + index);
  return {bits.x, bits.y};
}

// The words of a thread's two rows, of which `row` is the first, for one chunk of columns.
struct BitsOfRows {
  uint32_t const* words;
  int64_t next_row;
  int of_chunk;

  CUTLASS_DEVICE BitsOfRows(MaskBits const& mask, int batch, int head, int row)
      : words(mask.bits + batch * mask.bits_of_batch + head * mask.bits_of_head +
              row * mask.bits_of_row + threadIdx.x % 4),
        next_row(8 * mask.bits_of_row),
        of_chunk(mask.bits_of_chunk) {}

  CUTLASS_DEVICE void load(int chunk, uint32_t (&found)[kRowsPerThread]) const {
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      found[r] = __ldg(words + r * next_row + int64_t{chunk} * of_chunk);
    }
  }
};

// Sets what the bits hide to -inf, too.
template <class Scores>
CUTLASS_DEVICE void mask_scores(Scores& scores, Interval const (&rows)[kRowsPerThread], int column,
                                uint32_t const (&bits)[kRowsPerThread]) {
  mask_scores(scores, rows, column);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(scores); ++i) {
    int const element = i / 4 * 2 + i % 2;
    scores(i) = bits[fragment_row(i)] >> element & 1 ? scores(i) : -INFINITY;
  }
}

// Goes through the blocks of columns that are seen, from the last before `end` down.
struct BlockWalk {
  MaskBits const& mask;
  int batch, head, row_block;
  int word;
  BlockBits bits;
  bool full;  // of the block that next() gave

  CUTLASS_DEVICE BlockWalk(MaskBits const& mask, int batch, int head, int row_block, int end)
      : mask(mask), batch(batch), head(head), row_block(row_block), word((end - 1) / 32) {
    bits = block_bits(mask, batch, head, row_block, word);
    bits.any &= ~0u >> (31 - (end - 1) % 32);
  }

  // There must be one.
  CUTLASS_DEVICE int next() {
    while (bits.any == 0) bits = block_bits(mask, batch, head, row_block, --word);
    int const bit = 31 - __clz(bits.any);
    bits.any ^= 1u << bit;
    full = bits.full >> bit & 1;
    return word * 32 + bit;
  }
};

// Cuts hidden blocks of columns off both ends of [begin, end); to 0 and 0 if all are. By a whole
// warp.
CUTLASS_DEVICE void trim_hidden(MaskBits const& mask, int batch, int head, int row_block,
                                int& begin, int& end) {
  int first = INT32_MAX;
  int last = -1;
  for (int word = begin / 32 + threadIdx.x % 32; word * 32 < end; word += 32) {
    uint32_t any = block_bits(mask, batch, head, row_block, word).any;
    if (word * 32 < begin) any &= ~0u << begin % 32;
    if (word * 32 + 32 > end) any &= ~0u >> (32 - end % 32);
    if (any == 0) continue;
    first = min(first, word * 32 + __ffs(any) - 1);
    last = max(last, word * 32 + 31 - __clz(any));
  }
  first = __reduce_min_sync(~0u, first);
  last = __reduce_max_sync(~0u, last);
  begin = last < 0 ? 0 : first;
  end = last + 1;
}

}  // namespace jax_fa3
