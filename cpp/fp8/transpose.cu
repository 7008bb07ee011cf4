#include "common/launch.h"
#include "fp8/transpose.h"
#include "plan.h"

namespace jax_fa3::fp8 {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 64;  // of V, for one CTA

// A CTA takes kBlock keys and kColumns columns of one head, through shared memory: so its global
// reads and writes are of more bytes in a row than those of transpose_warp_tile(). Shared memory is
// written and read in vectors of 4 bytes, that is of 4 columns of one key.
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(__grid_constant__ Transpose const params) {
  constexpr int kVec4s = kColumns / 4;
  cudaTriggerProgrammaticLaunchCompletion();  // the forward may start where an SM has room
  // After each 16 keys 16 bytes are left empty: then no two lanes read from one bank.
  __shared__ alignas(16) uint32_t tile[kBlock * kVec4s + kBlock / 16 * 4];
  auto const index_of = [](int key, int vec4) { return key * kVec4s + key / 16 * 4 + vec4; };
  int const num_columns = (params.head_dim + kColumns - 1) / kColumns;
  int const column = blockIdx.x % num_columns * kColumns;
  KeyBlock const block = key_block(params, static_cast<int>(blockIdx.x) / num_columns);
  int const length = params.mask.length_k(block.batch);
  bool const valid = is_scale(*scale_of(params, block));
  auto const* const source = block_of_value(params, block) + column;
  constexpr int kVectors = kColumns / 16;
  constexpr int kLoads = kBlock * kVectors / kThreads;
  int const vector = threadIdx.x % kVectors;
  auto const key_of = [](int i) { return (threadIdx.x + i * kThreads) / kVectors; };
  uint4 data[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    int const key = key_of(i);
    data[i] = uint4{0, 0, 0, 0};
    if (block.n_block * kBlock + key < length && column + vector * 16 < params.head_dim) {
      data[i] = __ldcs(reinterpret_cast<uint4 const*>(source + key * params.value.seqlen_stride) +
                       vector);
    }
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    *reinterpret_cast<uint4*>(tile + index_of(key_of(i), vector * 4)) =
        valid ? data[i] : uint4{0, 0, 0, 0};
  }
  __syncthreads();

  // A thread takes 16 keys of 4 columns; 8 neighbours write 128 bytes of each column.
  int const group = threadIdx.x % 8;
  int64_t const row_bytes = row_bytes_of(params);
  for (int vec4 = threadIdx.x / 8; vec4 < kVec4s; vec4 += kThreads / 8) {
    uint32_t out[4][4];  // [column][slots 4 c + {0, 1, 2, 3}]
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int const key = group * 16 + 2 * c;
      uint32_t const rows[4] = {tile[index_of(key, vec4)], tile[index_of(key + 1, vec4)],
                                tile[index_of(key + 8, vec4)], tile[index_of(key + 9, vec4)]};
      uint32_t columns[4];
      transpose_4x4(rows, columns);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i][c] = columns[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const target = column + vec4 * 4 + i;
      if (target >= params.head_dim) break;
      uint8_t* const bytes = block_of_out(params, block) + target * row_bytes + group * 16;
      *reinterpret_cast<uint4*>(bytes) = uint4{out[i][0], out[i][1], out[i][2], out[i][3]};
    }
  }
}

}  // namespace

cudaError_t launch_transpose(Transpose const& problem, cudaStream_t stream) {
  Transpose params = problem;
  int64_t const ctas = int64_t{params.order.num_tiles()} * ceil_div(params.head_dim, kColumns);
  if (ctas == 0) return cudaSuccess;
  return launch_kernel(transpose_kernel, ctas, kThreads, 0, params, stream);
}

}  // namespace jax_fa3::fp8
