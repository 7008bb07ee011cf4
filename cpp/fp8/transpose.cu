#include "common/launch.h"
#include "fp8/transpose.h"
#include "plan.h"

namespace jax_fa3::fp8 {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 64;  // of V, of one CTA, beside kBlock keys

// A CTA takes kBlock keys and kColumns columns of one head, through shared memory: so it reads and
// writes longer pieces than transpose_unit().
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(__grid_constant__ Transpose const params) {
  constexpr int kRowWords = kColumns / 4;
  cudaTriggerProgrammaticLaunchCompletion();  // the forward may start where an SM has room
  // Behind each 16 keys 4 words are left out: then no two lanes read from one bank.
  __shared__ alignas(16) uint32_t tile[kBlock * kRowWords + kBlock / 16 * 4];
  auto const word_of = [](int key, int word) { return key * kRowWords + key / 16 * 4 + word; };
  int const num_columns = (params.head_dim + kColumns - 1) / kColumns;
  int const column = blockIdx.x % num_columns * kColumns;
  TileCoord const block = params.order(static_cast<int>(blockIdx.x) / num_columns);
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
    if (block.block * kBlock + key < length && column + vector * 16 < params.head_dim) {
      data[i] = __ldcs(reinterpret_cast<uint4 const*>(source + key * params.value.seqlen_stride) +
                       vector);
    }
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    *reinterpret_cast<uint4*>(tile + word_of(key_of(i), vector * 4)) =
        valid ? data[i] : uint4{0, 0, 0, 0};
  }
  __syncthreads();

  // A thread takes 16 keys of 4 columns; 8 neighbours write 128 bytes of each column.
  int const group = threadIdx.x % 8;
  int64_t const row_bytes = row_bytes_of(params);
  for (int word = threadIdx.x / 8; word < kColumns / 4; word += kThreads / 8) {
    uint32_t out[4][4];  // [column][slots 4 c + {0, 1, 2, 3}]
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int const key = group * 16 + 2 * c;
      uint32_t const rows[4] = {tile[word_of(key, word)], tile[word_of(key + 1, word)],
                                tile[word_of(key + 8, word)], tile[word_of(key + 9, word)]};
      uint32_t columns[4];
      transpose_4x4(rows, columns);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i][c] = columns[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const target = column + word * 4 + i;
      if (target >= params.head_dim) break;
      uint8_t* const bytes = block_of_out(params, block) + target * row_bytes + group * 16;
      *reinterpret_cast<uint4*>(bytes) = uint4{out[i][0], out[i][1], out[i][2], out[i][3]};
    }
  }
}

}  // namespace

cudaError_t launch(Transpose const& problem, cudaStream_t stream) {
  Transpose params = problem;
  int64_t const ctas = int64_t{params.order.num_tiles()} * ceil_div(params.head_dim, kColumns);
  if (ctas == 0) return cudaSuccess;
  return launch_kernel(transpose_kernel, ctas, kThreads, 0, params, stream);
}

}  // namespace jax_fa3::fp8
