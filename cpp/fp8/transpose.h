// V as wgmma wants an 8-bit B operand: keys along its rows.
//
// P leaves the softmax as an accumulator, of which a thread holds columns 8 j + 2 c + {0, 1} of a
// row (c = lane % 4); as an A operand of 8-bit elements it must hold 4 c + {0, 1, 2, 3} and 16 more
// of each 32. No element has to move if V's keys are in the same order: within each 16, slot
// 4 c + q is key 8 (q / 2) + 2 c + q % 2.
//
// Keys at or past the length become 0: whatever stands there, NaN too, meets probabilities of 0
// later. So does a block without a scale: rows that see it are NaN by its scores (load.h), others
// must not be.
//
// Where many tiles read each block of V, the forward transposes it itself, in the order in which it
// is needed: each consumer warp a little at the start, the idle warps the rest (transpose_beside)
// while the tensor cores work on what is done. Otherwise a kernel does it before.
#pragma once

#include <cuda_runtime_api.h>

#include "common/tile_scheduler.h"
#include "fp8/fp8.h"

namespace jax_fa3::fp8 {

struct Transpose {
  Operand value;       // [b, s, k, v] of bytes
  uint8_t* out;        // [b, k, v, order.num_blocks * kBlock]
  Mask mask;           // for the lengths of the keys
  float const* scale;  // [b, order.num_blocks, k]; a block without a scale becomes 0
  int head_dim;
  TileOrder order;  // of blocks of keys
  // Of the forward that transposes beside its work: the units that are taken, and of each block
  // [b, k, order.num_blocks] those that are done; 0 at the start. Or null.
  int* taken;
  int* done;
};

// The kernel; without `taken` and `done`.
cudaError_t launch(Transpose const& problem, cudaStream_t stream);

// What a warp does at a time, of a block.
inline constexpr int kUnitKeys = 64;
inline constexpr int kUnitColumns = 32;

JAX_FA3_HOST_DEVICE constexpr int units_of_block(int head_dim) {
  return kBlock / kUnitKeys * ((head_dim + kUnitColumns - 1) / kUnitColumns);
}

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

// Where things of a block are.
__device__ __forceinline__ float const* scale_of(Transpose const& p, TileCoord const& block) {
  return p.scale + (int64_t{block.batch} * p.order.num_blocks + block.block) * p.order.num_heads +
         block.head;
}
__device__ __forceinline__ uint8_t const* block_of_value(Transpose const& p,
                                                         TileCoord const& block) {
  return static_cast<uint8_t const*>(p.value.data) + block.batch * p.value.batch_stride +
         block.head * p.value.head_stride + int64_t{block.block} * kBlock * p.value.seqlen_stride;
}
__device__ __forceinline__ int64_t row_bytes_of(Transpose const& p) {
  return int64_t{p.order.num_blocks} * kBlock;
}
__device__ __forceinline__ uint8_t* block_of_out(Transpose const& p, TileCoord const& block) {
  int64_t const head = int64_t{block.batch} * p.order.num_heads + block.head;
  return p.out + head * p.head_dim * row_bytes_of(p) + block.block * kBlock;
}
__device__ __forceinline__ int* done_of(Transpose const& p, TileCoord const& block) {
  int64_t const head = int64_t{block.batch} * p.order.num_heads + block.head;
  return p.done + head * p.order.num_blocks + block.block;
}

// One unit of a block; the whole warp calls it. A thread takes 8 columns of the 8 keys that become
// 8 slots in a row: 4 neighbours read 32 bytes of a key, and 8 threads write 64 of a column.
__device__ __forceinline__ void transpose_unit(Transpose const& params, TileCoord const& block,
                                               int unit) {
  int const lane = threadIdx.x % 32;
  int const slot = unit % (kBlock / kUnitKeys) * kUnitKeys + lane / 4 * 8;
  int const key = slot - lane / 4 % 2 * 4;
  auto const key_of = [](int i) { return i / 4 * 8 + i % 4; };  // from `key` on
  int const column = unit / (kBlock / kUnitKeys) * kUnitColumns + lane % 4 * 8;
  if (column >= params.head_dim) return;
  bool const valid = is_scale(__ldg(scale_of(params, block)));
  int const keys = valid ? params.mask.length_k(block.batch) - block.block * kBlock - key : 0;
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
    auto const word = [&](int i) { return half == 0 ? rows[i].x : rows[i].y; };
    uint32_t slots[2][4];  // [4 slots][column]
    transpose_4x4({word(0), word(1), word(4), word(5)}, slots[0]);
    transpose_4x4({word(2), word(3), word(6), word(7)}, slots[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto* const address = target + (half * 4 + i) * row_bytes;
      *reinterpret_cast<uint2*>(address) = uint2{slots[0][i], slots[1][i]};
    }
  }
}

// The units, side by side in one block, that the warp is to transpose; in lane 0.
inline constexpr int kUnitsAtOnce = 2;
__device__ __forceinline__ int take_units(Transpose const& params) {
  return threadIdx.x % 32 == 0 ? atomicAdd(params.taken, kUnitsAtOnce) : 0;
}

// Whether there were such units.
template <int kHeadDim>
__device__ __forceinline__ bool transpose_taken(Transpose const& params, int taken) {
  constexpr int kUnits = units_of_block(kHeadDim);
  static_assert(kUnits % kUnitsAtOnce == 0);
  int const first = __shfl_sync(~0u, taken, 0);
  if (first >= params.order.num_tiles() * kUnits) return false;
  TileCoord block = params.order(first / kUnits);
#pragma unroll 1
  for (int i = 0; i < kUnitsAtOnce; ++i) {
    // So that ptxas keeps no more than this for the next unit: registers are few.
    asm volatile("" : "+r"(block.block), "+r"(block.head), "+r"(block.batch));
    transpose_unit(params, block, first % kUnits + i);
  }
  asm volatile("fence.proxy.async.global;" ::: "memory");  // TMA will read it
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;"
                 :
                 : "l"(done_of(params, block)), "r"(kUnitsAtOnce)
                 : "memory");
  }
  return true;
}

// Until there are no more units.
template <int kHeadDim>
__device__ __forceinline__ void transpose_beside(Transpose const& params) {
  int next = take_units(params);
  for (;;) {
    int const taken = next;
    next = take_units(params);  // on its way meanwhile
    if (!transpose_taken<kHeadDim>(params, taken)) return;
  }
}

// Until a block may be read by this thread's TMA.
template <int kHeadDim>
__device__ __forceinline__ void wait_for(Transpose const& params, TileCoord const& block) {
  int const* const counter = done_of(params, block);
  int done;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(counter) : "memory");
  } while (done < units_of_block(kHeadDim));
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace jax_fa3::fp8
