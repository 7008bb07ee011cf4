// The mask: every query row sees one interval of keys, [begin, end).
//
// Causal, sliding window, padding and per-row arrays are all intersected into that interval, at run
// time, so that one kernel serves every mask. All of it is host-callable: tests brute-force it
// without a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JAX_FA3_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JAX_FA3_HOST_DEVICE inline
#endif

namespace jax_fa3 {

// A window side of this size or more never cuts anything (positions are below 2^33).
inline constexpr int64_t kUnbounded = int64_t{1} << 62;

// The pair (key_begin, key_end) that marks a row whose segment is a broken run of keys: such a row
// gives NaN. Both values exactly, which nobody writes by accident: any other pair of numbers,
// int32's extremes too, is an ordinary interval. The Python side writes the same pair (_broken.py).
inline constexpr int kBrokenBegin = 0x7FFA3FA3;
inline constexpr int kBrokenEnd = -0x7FFA3FA3;

struct Interval {
  int begin;
  int end;  // a row with begin >= end sees no key

  JAX_FA3_HOST_DEVICE bool empty() const { return begin >= end; }
  JAX_FA3_HOST_DEVICE bool broken() const { return begin == kBrokenBegin && end == kBrokenEnd; }
};

struct Mask {
  int seqlen_q;
  int seqlen_k;
  // Row i sees key j only if i + offset - window_left <= j <= i + offset + window_right.
  int64_t window_left;
  int64_t window_right;
  int const* query_offset;  // [1] or [b], or null: 0
  int query_offset_stride;  // 0 or 1
  int const* seqlens_q;     // [b], or null: seqlen_q
  int const* seqlens_k;     // [b], or null: seqlen_k
  int const* key_begin;     // [b, t], or null: 0
  int const* key_end;       // [b, t], or null: seqlen_k

  // Whether any row may see less than all keys.
  constexpr bool restricts() const {
    return window_left != kUnbounded || window_right != kUnbounded || seqlens_q != nullptr ||
           seqlens_k != nullptr || key_begin != nullptr || key_end != nullptr;
  }

  // Lengths are clamped to what the arrays hold, whatever the caller wrote into them.
  JAX_FA3_HOST_DEVICE int length_q(int batch) const {
    return seqlens_q == nullptr ? seqlen_q : clamp(seqlens_q[batch], 0, seqlen_q);
  }
  JAX_FA3_HOST_DEVICE int length_k(int batch) const {
    return seqlens_k == nullptr ? seqlen_k : clamp(seqlens_k[batch], 0, seqlen_k);
  }

  // The keys that `row` sees. 64-bit positions: no value of offset, window or length can overflow.
  JAX_FA3_HOST_DEVICE Interval row_interval(int batch, int row) const {
    if (row >= length_q(batch)) return {0, 0};
    int64_t begin = 0;
    int64_t end = length_k(batch);
    int64_t const index = int64_t{batch} * seqlen_q + row;
    int const array_begin = key_begin == nullptr ? 0 : key_begin[index];
    int const array_end = key_end == nullptr ? seqlen_k : key_end[index];
    Interval const array{array_begin, array_end};
    if (array.broken()) return array;
    int64_t const position =
        int64_t{row} + (query_offset == nullptr ? 0 : query_offset[batch * query_offset_stride]);
    begin = max(begin, int64_t{array_begin}, position - window_left);
    end = -max(-end, -int64_t{array_end}, -(position + window_right + 1));
    if (begin >= end) return {0, 0};
    return {static_cast<int>(begin), static_cast<int>(end)};
  }

 private:
  JAX_FA3_HOST_DEVICE static int clamp(int value, int low, int high) {
    return value < low ? low : (value > high ? high : value);
  }
  JAX_FA3_HOST_DEVICE static int64_t max(int64_t a, int64_t b, int64_t c) {
    int64_t const ab = a > b ? a : b;
    return ab > c ? ab : c;
  }
};

// The key blocks that a tile of query rows visits, [begin, end), and those among them in which no
// row is masked, [full_begin, full_end) (empty if full_begin >= full_end).
struct BlockRange {
  int begin;
  int full_begin;
  int full_end;
  int end;
};

// Accumulates the intervals of a tile's rows; rows that see nothing do not count.
struct IntervalHull {
  int min_begin = INT32_MAX;
  int max_begin = 0;
  int min_end = INT32_MAX;
  int max_end = 0;

  JAX_FA3_HOST_DEVICE void add(Interval interval) {
    if (interval.empty()) return;
    min_begin = interval.begin < min_begin ? interval.begin : min_begin;
    max_begin = interval.begin > max_begin ? interval.begin : max_begin;
    min_end = interval.end < min_end ? interval.end : min_end;
    max_end = interval.end > max_end ? interval.end : max_end;
  }

  JAX_FA3_HOST_DEVICE void merge(IntervalHull const& other) {
    min_begin = other.min_begin < min_begin ? other.min_begin : min_begin;
    max_begin = other.max_begin > max_begin ? other.max_begin : max_begin;
    min_end = other.min_end < min_end ? other.min_end : min_end;
    max_end = other.max_end > max_end ? other.max_end : max_end;
  }

#ifdef __CUDACC__
  // Of the rows of all lanes.
  __device__ __forceinline__ void reduce_warp() {
    min_begin = __reduce_min_sync(~0u, min_begin);
    max_begin = __reduce_max_sync(~0u, max_begin);
    min_end = __reduce_min_sync(~0u, min_end);
    max_end = __reduce_max_sync(~0u, max_end);
  }
#endif

  JAX_FA3_HOST_DEVICE BlockRange blocks(int block) const {
    if (max_end == 0) return {0, 0, 0, 0};
    return {min_begin / block, (max_begin + block - 1) / block, min_end / block,
            (max_end + block - 1) / block};
  }
};

}  // namespace jax_fa3
