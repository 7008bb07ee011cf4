// The intervals of the rows of one tile: what the rows of a batch entry share is found once, and of
// a row are left a few operations on 32-bit numbers.
#pragma once

#include "common/mask.h"

namespace jax_fa3 {

struct TileRows {
  int valid_rows;  // of the tile
  int length_k;
  int low, high;         // what the window leaves of the tile's first row, [low, high)
  int const* key_begin;  // of that row, or null
  int const* key_end;

  TileRows() = default;
  JAX_FA3_HOST_DEVICE TileRows(Mask const& mask, int batch, int first_row)
      : valid_rows(mask.length_q(batch) - first_row), length_k(mask.length_k(batch)) {
    int64_t const position =
        int64_t{first_row} +
        (mask.query_offset == nullptr ? 0 : mask.query_offset[batch * mask.query_offset_stride]);
    low = clamp(position - mask.window_left);
    high = clamp(position + mask.window_right + 1);
    int64_t const index = int64_t{batch} * mask.seqlen_q + first_row;
    key_begin = mask.key_begin == nullptr ? nullptr : mask.key_begin + index;
    key_end = mask.key_end == nullptr ? nullptr : mask.key_end + index;
  }

  // Mask::row_interval() of the tile's row i.
  JAX_FA3_HOST_DEVICE Interval operator()(int i) const {
    if (i >= valid_rows) return {0, 0};
    int begin = low + i > 0 ? low + i : 0;
    int end = high + i < length_k ? high + i : length_k;
    if (!ascend()) {
      Interval const array{key_begin == nullptr ? 0 : key_begin[i],
                           key_end == nullptr ? length_k : key_end[i]};
      if (array.broken()) return array;
      begin = array.begin > begin ? array.begin : begin;
      end = array.end < end ? array.end : end;
    }
    if (begin >= end) return {0, 0};
    return {begin, end};
  }

  // Whether there are no arrays: then neither end of an interval is before that of the row above.
  JAX_FA3_HOST_DEVICE bool ascend() const { return key_begin == nullptr && key_end == nullptr; }
  // If so: the hull of rows [first, first + count), by its first and its last row that see keys.
  JAX_FA3_HOST_DEVICE IntervalHull hull(int first, int count) const {
    int const first_seeing = first > 1 - high ? first : 1 - high;
    int end = first + count < valid_rows ? first + count : valid_rows;
    end = end < length_k - low ? end : length_k - low;
    IntervalHull hull;
    if (first_seeing < end) {
      hull.add((*this)(first_seeing));
      hull.add((*this)(end - 1));
    }
    return hull;
  }

 private:
  // Lengths are at most INT32_MAX - 256, and tiles have at most 256 rows: beyond that it does not
  // matter by how much.
  JAX_FA3_HOST_DEVICE static int clamp(int64_t key) {
    constexpr int64_t kMost = INT32_MAX - 256;
    return static_cast<int>(key < -256 ? -256 : (key > kMost ? kMost : key));
  }
};

}  // namespace jax_fa3
