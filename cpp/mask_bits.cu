// The kernel of mask_bits.h.
#include "common/mask.h"
#include "mask_bits.h"
#include "plan.h"

namespace jax_fa3 {
namespace {

constexpr int kRows = kMaskBlock;  // of a CTA, a thread each
constexpr int kChunksAtOnce = 4;   // with more, threads have too few registers
constexpr int kThreads = kRows * kChunksAtOnce;
constexpr int kWords = 4;  // of a chunk of a row
constexpr int kEighths = kMaskBlock / 8;

// Of word q, the bits of columns below `column`: it has 2 q and 2 q + 1 of each 8.
__device__ uint32_t bits_before(int column, int q) {
  int const key = column - 2 * q;
  int const count = key <= 0 ? 0 : key / 8 * 2 + min(key % 8, 2);
  return count >= 32 ? ~0u : (1u << count) - 1;
}

// A chunk of a lane's row, from columns: lane i's word g says which of the warp's 32 rows column
// 32 g + i sees.
__device__ void turn(uint32_t const (&rows_of_columns)[kWords], uint32_t (&bits)[kWords]) {
#pragma unroll
  for (int g = 0; g < kWords; ++g) {
    if (!__any_sync(~0u, rows_of_columns[g] != 0)) continue;
    // The columns that see the lane's row: squares of bits are exchanged, of 16, 8, ... each way.
    uint32_t columns = rows_of_columns[g];
#pragma unroll
    for (uint32_t size = 16, low = 0x0000FFFF; size > 0; size /= 2, low ^= low << size) {
      uint32_t const other = __shfl_xor_sync(~0u, columns, size);
      columns = threadIdx.x & size ? (columns & ~low) | (other & ~low) >> size
                                   : (columns & low) | (other & low) << size;
    }
#pragma unroll
    for (int q = 0; q < kWords; ++q) {
      uint32_t const pairs = columns >> 2 * q & 0x03030303;
      uint32_t const two = (pairs | pairs >> 6) & 0x000F000F;
      bits[q] |= ((two | two >> 12) & 0xFF) << 8 * g;
    }
  }
}

// A bool mask.
template <bool kRowsAreKeys>
struct OfBytes {
  static constexpr int kCtasOfSm = 2;
  static constexpr int kChunksOfCta = 8;  // so that a CTA writes whole bytes of blocks
  DenseMaskToBits const& p;
  uint8_t const* of_head;
  bool aligned;
  int row;

  __device__ OfBytes(DenseMaskToBits const& p, int head, int row)
      : p(p),
        of_head(p.mask + head / p.num_heads * p.mask_of_batch +
                head % p.num_heads * p.mask_of_head),
        aligned((p.mask_of_batch | p.mask_of_head | p.mask_of_row | p.mask_of_column) % 16 ==
                (p.mask_of_row == 1 || p.mask_of_column == 1)),
        row(row) {}

  __device__ bool same_columns() const { return p.mask_of_column == 0; }
  __device__ uint32_t seen_chunks(int, uint32_t&) const { return ~0u; }

  // A chunk of the row, of whose columns `count` exist; by whole warps.
  __device__ void read(int chunk, int count, uint32_t (&bits)[kWords]) const {
    int const first = chunk * kMaskBlock;
    if constexpr (kRowsAreKeys) {
      uint32_t rows_of_columns[kWords] = {};
      int const first_row = row - threadIdx.x % 32;
      uint8_t const* const from =
          of_head + (first + threadIdx.x % 32) * p.mask_of_column + first_row * p.mask_of_row;
      int const column_count = count - static_cast<int>(threadIdx.x % 32);  // from the lane's first
      if (aligned && p.mask_of_row == 1 && p.rows - first_row >= 32) {
        uint4 bytes[kWords][2];
#pragma unroll
        for (int g = 0; g < kWords; ++g) {  // all on their way together
          auto const* const vectors =
              reinterpret_cast<uint4 const*>(from + g * 32 * p.mask_of_column);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            bytes[g][i] = g * 32 < column_count ? __ldg(vectors + i) : uint4{0, 0, 0, 0};
          }
        }
#pragma unroll
        for (int g = 0; g < kWords; ++g) {
          rows_of_columns[g] = packed(bytes[g][0]) | packed(bytes[g][1]) << 16;
        }
      } else {
        for (int g = 0; g < kWords; ++g) {
          for (int i = 0; i < min(32, p.rows - first_row) && g * 32 < column_count; ++i) {
            uint32_t const bit = from[g * 32 * p.mask_of_column + i * p.mask_of_row] & 1;
            rows_of_columns[g] |= bit << i;
          }
        }
      }
      turn(rows_of_columns, bits);
    } else if (row < p.rows) {
      uint8_t const* const from = of_head + row * p.mask_of_row + first * p.mask_of_column;
      if (aligned && p.mask_of_column == 1 && count == kMaskBlock) {
        read_vectors(from, bits);
        return;
      }
#pragma unroll 8
      for (int column = 0; column < kMaskBlock; ++column) {
        uint32_t const bit = column < count ? from[column * p.mask_of_column] & 1 : 0;
        bits[column % 8 / 2] |= bit << (column / 8 * 2 + column % 2);
      }
    }
  }

  // The bits of 16 bytes.
  __device__ static uint32_t packed(uint4 const& x) {
    auto const bits = [](uint32_t bytes) { return bytes * 0x01020408u >> 24 & 0xF; };
    return bits(x.x) | bits(x.y) << 4 | bits(x.z) << 8 | bits(x.w) << 12;
  }

  __device__ static void read_vectors(uint8_t const* from, uint32_t (&bits)[kWords]) {
    uint2 eighths[kEighths];
#pragma unroll
    for (int i = 0; i < kEighths; i += 2) {
      uint4 const x = __ldg(reinterpret_cast<uint4 const*>(from) + i / 2);
      eighths[i] = {x.x, x.y};
      eighths[i + 1] = {x.z, x.w};
    }
    auto const pair = [](uint32_t bytes) { return (bytes & 1) | (bytes >> 7 & 2); };
#pragma unroll
    for (int i = 0; i < kEighths; ++i) {
      bits[0] |= pair(eighths[i].x) << 2 * i;
      bits[1] |= pair(eighths[i].x >> 16) << 2 * i;
      bits[2] |= pair(eighths[i].y) << 2 * i;
      bits[3] |= pair(eighths[i].y >> 16) << 2 * i;
    }
  }
};

// Intervals of each query row, whose union it sees.
template <bool kRowsAreKeys>
struct OfIntervals {
  static constexpr int kCtasOfSm = 1;
  // With 8, of 16k query rows 2,048 CTAs, most of which have nothing to write: 24 us for 16.
  static constexpr int kChunksOfCta = kRowsAreKeys ? 8 : 32;
  DenseMaskToBits const& p;
  int const* of_batch;  // [t, 2, m]
  int row;

  __device__ OfIntervals(DenseMaskToBits const& p, int batch, int row)
      : p(p),
        of_batch(p.intervals +
                 int64_t{batch} * (kRowsAreKeys ? p.columns : p.rows) * 2 * p.num_intervals),
        row(row) {}

  __device__ bool same_columns() const { return false; }

  // Of the CTA's chunks from `first_chunk` on, which any of its rows sees, in a bit each; by the
  // whole CTA. The others need no bits: nobody reads them.
  __device__ uint32_t seen_chunks(int first_chunk, uint32_t& shared) const {
    if (threadIdx.x == 0) shared = 0;
    __syncthreads();
    uint32_t seen = 0;
    if constexpr (kRowsAreKeys) {
      // A warp looks at the query rows of each of its chunks.
      int const first_key = row - threadIdx.x % kRows;
      for (int i = threadIdx.x / 32; i < kChunksOfCta; i += kThreads / 32) {
        int const first_row = (first_chunk + i) * kMaskBlock + threadIdx.x % 32;
        bool any = false;
#pragma unroll
        for (int of_lane = 0; of_lane < kMaskBlock; of_lane += 32) {
#pragma unroll
          for (int m = 0; m < kMostIntervals; ++m) {
            any |= !interval(first_row + of_lane, p.columns, m, first_key, kRows).empty();
          }
        }
        if (__any_sync(~0u, any)) seen |= 1u << i;
      }
    } else {
      constexpr int kKeys = kChunksOfCta * kMaskBlock;
#pragma unroll
      for (int m = 0; m < kMostIntervals; ++m) {
        Interval const keys = interval(row, p.rows, m, first_chunk * kMaskBlock, kKeys);
        if (keys.empty()) continue;
        seen |= ~0u >> (31 - (keys.end - 1) / kMaskBlock) & ~0u << keys.begin / kMaskBlock;
      }
      seen = __reduce_or_sync(~0u, seen);
    }
    if (threadIdx.x % 32 == 0 && seen != 0) atomicOr(&shared, seen);
    __syncthreads();
    return shared;
  }
  // Within [first, first + size), counted from there; empty where there is no such row or interval.
  // No branch, so that all that are asked for are on their way together.
  __device__ Interval interval(int query_row, int query_rows, int i, int first, int size) const {
    int const* const of_row = of_batch + int64_t{query_row} * 2 * p.num_intervals + i;
    bool const exists = i < p.num_intervals && query_row < query_rows;
    int const begin = max(exists ? __ldg(of_row) : 0, first);
    int const end = min(exists ? __ldg(of_row + p.num_intervals) : 0, first + size);
    return {begin - first, max(end, first) - first};
  }

  __device__ void read(int chunk, int count, uint32_t (&bits)[kWords]) const {
    int const first = chunk * kMaskBlock;
    if constexpr (kRowsAreKeys) {
      int const first_key = row - threadIdx.x % 32;
      uint32_t rows_of_columns[kWords] = {};
#pragma unroll
      for (int g = 0; g < kWords; ++g) {
        int const column = g * 32 + threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kMostIntervals; ++i) {
          int const keys = min(32, p.rows - first_key);
          Interval const seen = interval(first + column, first + count, i, first_key, keys);
          if (!seen.empty()) rows_of_columns[g] |= ~0u >> (32 - seen.end) & ~0u << seen.begin;
        }
      }
      turn(rows_of_columns, bits);
    } else if (row < p.rows) {
#pragma unroll
      for (int i = 0; i < kMostIntervals; ++i) {
        Interval const seen = interval(row, p.rows, i, first, count);
        if (seen.empty()) continue;
#pragma unroll
        for (int q = 0; q < kWords; ++q) {
          bits[q] |= bits_before(seen.end, q) & ~bits_before(seen.begin, q);
        }
      }
    }
  }
};

template <class Source>
__global__ void __launch_bounds__(kThreads, Source::kCtasOfSm)
    mask_bits_kernel(DenseMaskToBits const p) {
  constexpr int kChunksOfCta = Source::kChunksOfCta;
  __shared__ uint32_t any[2], hidden[2];  // of the CTA's blocks
  __shared__ uint32_t shared_seen;
  if (threadIdx.x < 2) any[threadIdx.x] = hidden[threadIdx.x] = 0;
  __syncthreads();
  int const row_blocks = (p.rows + kRows - 1) / kRows;
  int const row_block = blockIdx.x % row_blocks;
  int const of_head = blockIdx.x / row_blocks;  // batch entry and head
  int const row = row_block * kRows + threadIdx.x % kRows;
  int const first_chunk = blockIdx.y * kChunksOfCta;
  int64_t const rows_of_head = p.rows == 1 ? 1 : int64_t{row_blocks} * kRows;
  Source const source(p, of_head, row);
  bool const same_columns = source.same_columns();

  uint32_t const seen_chunks = source.seen_chunks(first_chunk, shared_seen);

  for (int i = threadIdx.x / kRows; i < kChunksOfCta; i += kChunksAtOnce) {
    int const chunk = first_chunk + i;
    if (chunk >= p.chunks) break;
    bool const is_seen = seen_chunks >> i & 1;
    int const count = same_columns ? kMaskBlock : min(kMaskBlock, p.columns - chunk * kMaskBlock);
    uint32_t bits[kWords] = {};
    if (is_seen) source.read(chunk, count, bits);
    if (is_seen && row < rows_of_head) {
      auto* const to = reinterpret_cast<uint4*>(p.bits);
      to[(of_head * rows_of_head + row) * p.chunks + chunk] =
          uint4{bits[0], bits[1], bits[2], bits[3]};
    }
    for (int half = 0; half < p.blocks_of_chunk; ++half) {
      uint32_t const meant = p.blocks_of_chunk == 1 ? ~0u : 0xffffu << 16 * half;
      uint32_t seen = 0;
      uint32_t unseen = 0;
      for (int q = 0; q < kWords; ++q) {
        seen |= bits[q] & meant;
        unseen |= ~bits[q] & bits_before(count, q) & meant;
      }
      bool const any_seen = __any_sync(~0u, seen != 0);
      bool const any_hidden = __any_sync(~0u, row < p.rows && unseen != 0);
      int const block = i * p.blocks_of_chunk + half;
      if (threadIdx.x % 32 != 0) continue;
      if (any_seen) atomicOr(&any[block / 32], 1u << block % 32);
      if (any_hidden) atomicOr(&hidden[block / 32], 1u << block % 32);
    }
  }
  __syncthreads();
  uint32_t* const words = p.blocks + (int64_t{of_head} * row_blocks + row_block) * p.words * 2;
  if (same_columns) {
    for (int word = threadIdx.x; blockIdx.y == 0 && word < p.words; word += kThreads) {
      words[2 * word] = any[0] & 1 ? ~0u : 0;
      words[2 * word + 1] = hidden[0] & 1 ? 0 : ~0u;
    }
    return;
  }
  int const thread = threadIdx.x;
  int const count = kChunksOfCta / 8 * p.blocks_of_chunk;
  int const byte = blockIdx.y * count + thread;
  if (thread >= count || byte >= 4 * p.words) return;
  auto* const bytes = reinterpret_cast<uint8_t*>(words) + byte / 4 * 8 + byte % 4;
  bytes[0] = any[thread / 4] >> thread % 4 * 8;
  bytes[4] = ~hidden[thread / 4] >> thread % 4 * 8;
}

template <class Source>
cudaError_t launch(DenseMaskToBits const& problem, cudaStream_t stream) {
  int const bytes_of_cta = Source::kChunksOfCta / 8 * problem.blocks_of_chunk;
  dim3 const grid(problem.batch * problem.num_heads * ceil_div(problem.rows, kRows),
                  ceil_div(4 * problem.words, bytes_of_cta));
  void* arguments[] = {const_cast<DenseMaskToBits*>(&problem)};
  return cudaLaunchKernel(reinterpret_cast<void const*>(mask_bits_kernel<Source>), grid,
                          dim3(kThreads), arguments, 0, stream);
}

}  // namespace

cudaError_t launch_mask_bits(DenseMaskToBits const& problem, cudaStream_t stream) {
  if (problem.mask != nullptr) {
    return problem.rows_are_keys ? launch<OfBytes<true>>(problem, stream)
                                 : launch<OfBytes<false>>(problem, stream);
  }
  return problem.rows_are_keys ? launch<OfIntervals<true>>(problem, stream)
                               : launch<OfIntervals<false>>(problem, stream);
}

}  // namespace jax_fa3
