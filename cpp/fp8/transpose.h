// V as wgmma wants an 8-bit B operand: V^T, with keys along its rows.
//
// P leaves the softmax as an accumulator, of which a thread holds columns 8 j + 2 c + {0, 1} of a
// row (c = lane % 4); as an A operand of 8-bit elements it must hold 4 c + {0, 1, 2, 3} and 16 more
// of each 32. No element has to move if V's keys are in the same order: within each 16, slot
// 4 c + q is key 8 (q / 2) + 2 c + q % 2.
//
// Keys at or past the length become 0: P is 0 there, and 0 times what stands there might be NaN.
// A block whose scale is invalid becomes 0, too: rows that see it are NaN by their scores (load.h),
// and rows that do not see it must not become NaN by 0 times it.
//
// Three ways: quantize writes V so (quantize.cu); or transpose_kernel in transpose.cu, before the
// forward; or where many tiles read each block of V, the forward itself, in the order in which
// tiles need it. Then each consumer warp does a little at the start, and the producer's two spare
// warps the rest (transpose_all()) while the tensor cores work on what is done.
#pragma once

#include <cuda_runtime_api.h>

#include "common/tile_scheduler.h"
#include "fp8/fp8.h"

namespace jax_fa3::fp8 {

struct Transpose {
  Operand value;       // [b, s, k, v] of bytes
  uint8_t* out;        // [b, k, v, num_n_blocks * kBlock]
  Mask mask;           // for the lengths of the keys
  float const* scale;  // [b, num_n_blocks, k]
  int head_dim;
  TileOrder order;  // its tiles are blocks of kBlock keys
  // Where the forward does it, else null; 0 at the start. How many warp tiles have been claimed,
  // and [b, k, num_n_blocks] how many of each block are done.
  int* warp_tile_counter;
  int* num_done;

  JAX_FA3_HOST_DEVICE int num_n_blocks() const { return order.num_blocks; }
};

// Launches transpose_kernel.
cudaError_t launch_transpose(Transpose const& problem, cudaStream_t stream);

// A block of keys of one KV head.
struct KeyBlock {
  int n_block;
  int head;
  int batch;
};

__device__ __forceinline__ KeyBlock key_block(Transpose const& p, int index) {
  auto const [n_block, head, batch] = p.order(index);
  return {n_block, head, batch};
}

// What a warp of the forward transposes at a time: so much of a block.
inline constexpr int kWarpTileKeys = 64;
inline constexpr int kWarpTileColumns = 32;

JAX_FA3_HOST_DEVICE constexpr int warp_tiles_of_block(int head_dim) {
  return kBlock / kWarpTileKeys * ((head_dim + kWarpTileColumns - 1) / kWarpTileColumns);
}

// A block of V in shared memory, words of 4 columns of one key: where a word is. After each 16 keys
// 16 bytes are left empty, and words change places by eights: no two lanes read from one bank, nor
// write to one if they have 8 columns each of rows next to each other.
template <int kVec4s_>
struct ValueTile {
  static constexpr int kVec4s = kVec4s_;
  static constexpr int kWords = kBlock * kVec4s + kBlock / 16 * 4;
  __device__ static constexpr int index(int key, int vec4) {
    int const eights = kVec4s >= 32 ? key % 4 : key / 2 % 2;
    return key * kVec4s + key / 16 * 4 + (vec4 ^ eights * 8);
  }
};

// 4 rows of 4 bytes to 4 columns of 4 bytes.
__device__ __forceinline__ void transpose_4x4(uint32_t const (&rows)[4], uint32_t (&columns)[4]) {
  uint32_t const low01 = __byte_perm(rows[0], rows[1], 0x5140);  // r0c0 r1c0 r0c1 r1c1
  uint32_t const low23 = __byte_perm(rows[2], rows[3], 0x5140);
  uint32_t const high01 = __byte_perm(rows[0], rows[1], 0x7362);  // r0c2 r1c2 r0c3 r1c3
  uint32_t const high23 = __byte_perm(rows[2], rows[3], 0x7362);
  columns[0] = __byte_perm(low01, low23, 0x5410);
  columns[1] = __byte_perm(low01, low23, 0x7632);
  columns[2] = __byte_perm(high01, high23, 0x5410);
  columns[3] = __byte_perm(high01, high23, 0x7632);
}

// Where a block's scale, its V, its V^T and its count of warp tiles are.
__device__ __forceinline__ float const* scale_of(Transpose const& p, KeyBlock const& block) {
  return p.scale + (int64_t{block.batch} * p.num_n_blocks() + block.n_block) * p.order.num_heads +
         block.head;
}
__device__ __forceinline__ uint8_t const* block_of_value(Transpose const& p,
                                                         KeyBlock const& block) {
  return static_cast<uint8_t const*>(p.value.data) + block.batch * p.value.batch_stride +
         block.head * p.value.head_stride + int64_t{block.n_block} * kBlock * p.value.seqlen_stride;
}
__device__ __forceinline__ int64_t row_bytes_of(Transpose const& p) {
  return int64_t{p.num_n_blocks()} * kBlock;
}
__device__ __forceinline__ uint8_t* block_of_out(Transpose const& p, KeyBlock const& block) {
  int64_t const head = int64_t{block.batch} * p.order.num_heads + block.head;
  return p.out + head * p.head_dim * row_bytes_of(p) + block.n_block * kBlock;
}
__device__ __forceinline__ int* num_done_of(Transpose const& p, KeyBlock const& block) {
  int64_t const head = int64_t{block.batch} * p.order.num_heads + block.head;
  return p.num_done + head * p.num_n_blocks() + block.n_block;
}

// One warp tile of a block; the whole warp calls it. A thread takes 8 columns of the 8 keys that
// become 8 slots in a row: 4 neighbours read 32 bytes of a key, and 8 threads write 64 of a column.
__device__ __forceinline__ void transpose_warp_tile(Transpose const& params, KeyBlock const& block,
                                                    int index) {
  int const lane = threadIdx.x % 32;
  int const slot = index % (kBlock / kWarpTileKeys) * kWarpTileKeys + lane / 4 * 8;
  int const key = slot - lane / 4 % 2 * 4;
  auto const key_of = [](int i) { return i / 4 * 8 + i % 4; };  // from `key` on
  int const column = index / (kBlock / kWarpTileKeys) * kWarpTileColumns + lane % 4 * 8;
  if (column >= params.head_dim) return;
  bool const valid = is_scale(__ldg(scale_of(params, block)));
  int const keys = valid ? params.mask.length_k(block.batch) - block.n_block * kBlock - key : 0;
  int64_t const stride = params.value.seqlen_stride;
  auto const* const source = block_of_value(params, block) + key * stride + column;
  uint2 rows[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    auto const* const address = source + key_of(i) * stride;
    rows[i] = key_of(i) < keys ? __ldcs(reinterpret_cast<uint2 const*>(address)) : uint2{0, 0};
  }
  int64_t const row_bytes = row_bytes_of(params);
  uint8_t* const target = block_of_out(params, block) + column * row_bytes + slot;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // of the columns
    auto const row = [&](int i) { return half == 0 ? rows[i].x : rows[i].y; };
    uint32_t slots[2][4];  // [4 slots][column]
    transpose_4x4({row(0), row(1), row(4), row(5)}, slots[0]);
    transpose_4x4({row(2), row(3), row(6), row(7)}, slots[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto* const address = target + (half * 4 + i) * row_bytes;
      *reinterpret_cast<uint2*>(address) = uint2{slots[0][i], slots[1][i]};
    }
  }
}

// Stores 16 keys (group * 16 on) of 4 columns of a block in shared memory; 8 neighbouring threads,
// each with a group, write 128 bytes of each column. `out`: of the block's first key and column.
template <int kVec4s>
__device__ __forceinline__ void store_columns(uint32_t const* tile, int group, int vec4,
                                              int num_columns, int64_t row_bytes, uint8_t* out) {
  uint32_t slots[4][4];  // [column][slots 4 c + {0, 1, 2, 3}]
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    auto const word = [&](int i) {
      return tile[ValueTile<kVec4s>::index(group * 16 + 2 * c + i, vec4)];
    };
    uint32_t columns[4];
    transpose_4x4({word(0), word(1), word(8), word(9)}, columns);
#pragma unroll
    for (int i = 0; i < 4; ++i) slots[i][c] = columns[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int const column = vec4 * 4 + i;
    if (column >= num_columns) break;
    auto* const address = reinterpret_cast<uint4*>(out + column * row_bytes + group * 16);
    *address = uint4{slots[i][0], slots[i][1], slots[i][2], slots[i][3]};
  }
}

// Claims the next warp tiles for this warp, neighbours in one block. Returns, in lane 0, the number
// of the first one, which may be past the last.
inline constexpr int kWarpTilesPerClaim = 2;
__device__ __forceinline__ int claim_warp_tiles(Transpose const& params) {
  return threadIdx.x % 32 == 0 ? atomicAdd(params.warp_tile_counter, kWarpTilesPerClaim) : 0;
}

// Transposes them. False if there were none left.
template <int kHeadDim>
__device__ __forceinline__ bool transpose_claimed(Transpose const& params, int claimed) {
  constexpr int kWarpTiles = warp_tiles_of_block(kHeadDim);
  static_assert(kWarpTiles % kWarpTilesPerClaim == 0);
  int const first = __shfl_sync(~0u, claimed, 0);
  if (first >= params.order.num_tiles() * kWarpTiles) return false;
  KeyBlock block = key_block(params, first / kWarpTiles);
#pragma unroll 1
  for (int i = 0; i < kWarpTilesPerClaim; ++i) {
    // ptxas must take these three for changed: it computes all addresses anew for the next warp
    // tile and need not keep them in registers, of which there are few.
    asm volatile("" : "+r"(block.n_block), "+r"(block.head), "+r"(block.batch));
    transpose_warp_tile(params, block, first % kWarpTiles + i);
  }
  // V^T is written by ordinary stores and read by TMA, which is another proxy.
  asm volatile("fence.proxy.async.global;" ::: "memory");
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;"
                 :
                 : "l"(num_done_of(params, block)), "r"(kWarpTilesPerClaim)
                 : "memory");
  }
  return true;
}

// Transposes until all warp tiles are claimed. The next claim is made before the last one's work,
// so that the latency of the atomic is hidden.
template <int kHeadDim>
__device__ __forceinline__ void transpose_all(Transpose const& params) {
  int next = claim_warp_tiles(params);
  for (;;) {
    int const claimed = next;
    next = claim_warp_tiles(params);
    if (!transpose_claimed<kHeadDim>(params, claimed)) return;
  }
}

// Waits until all of a block is transposed and this thread may have TMA read it.
template <int kHeadDim>
__device__ __forceinline__ void wait_transposed(Transpose const& params, KeyBlock const& block) {
  int const* const counter = num_done_of(params, block);
  int done;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(counter) : "memory");
  } while (done < warp_tiles_of_block(kHeadDim));
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace jax_fa3::fp8
