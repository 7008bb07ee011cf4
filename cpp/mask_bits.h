// A dense mask, bool or several intervals a row, to the bits and blocks that the kernels read
// (common/mask_bits.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_fa3 {

inline constexpr int kMostIntervals = 4;

struct DenseMaskToBits {
  uint8_t const* mask;   // 0 or 1; or null:
  int const* intervals;  // [batch, query rows, 2, num_intervals], begins and ends
  int num_intervals;
  bool rows_are_keys;  // of the bits: for the backward
  int batch, num_heads;
  int rows, columns;  // of the bits: of the backward's, keys and query rows; 1: the same for all
  int64_t mask_of_batch, mask_of_head, mask_of_row, mask_of_column;  // strides
  uint32_t* bits;    // [batch, num_heads, rows in whole blocks of 128 or 1, chunks, 4]
  uint32_t* blocks;  // [batch, num_heads, blocks of 128 rows, words, 2]
  int chunks;        // of 128 columns
  int words;
  int blocks_of_chunk;  // 1 or 2: blocks have 128 or 64 columns
};

#ifdef JAX_FA3_HAS_CUDA
cudaError_t launch_mask_bits(DenseMaskToBits const& problem, cudaStream_t stream);
#else  // a build without kernels
inline cudaError_t launch_mask_bits(DenseMaskToBits const&, cudaStream_t) {
  return cudaErrorNotSupported;
}
#endif

}  // namespace jax_fa3
