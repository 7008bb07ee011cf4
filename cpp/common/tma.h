// TMA: descriptors made on the host, tiles copied on the device.
//
// A tile of R rows and D columns lies in shared memory as slabs of R rows of kSlab columns, each
// row swizzled within its slab: the layout that wgmma reads (common/layouts.h).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "common/barriers.h"
#include "common/layouts.h"
#include "problem.h"

namespace jax_fa3 {

// The driver's encoder, looked up at run time: the library does not link to libcuda.
using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);

inline TensorMapEncoder tensor_map_encoder() {
  static TensorMapEncoder const encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t const error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    bool const ok = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<TensorMapEncoder>(function) : nullptr;
  }();
  return encoder;
}

enum class Swizzle {
  kBySlab,  // over the 64 or 128 bytes of a slab's rows
  kNone,    // a slab is of any width
};

// Describes a [b, s, h, d] operand of 16-bit elements (or of 8 bits), read or written in boxes of
// `box_rows` rows of one slab. Rows and columns outside the array read as 0 and are not written.
template <class Element = uint16_t>
cudaError_t make_tensor_map(CUtensorMap* map, Operand const& operand, int head_dim, int seqlen,
                            int heads, int batch, int slab, int box_rows,
                            CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                            Swizzle swizzle = Swizzle::kBySlab) {
  constexpr int kBytes = sizeof(Element);
  auto const encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  auto const size = [](int n) { return static_cast<cuuint64_t>(n > 0 ? n : 1); };
  auto const bytes = [](int64_t n) { return static_cast<cuuint64_t>(n > 0 ? kBytes * n : 16); };
  cuuint64_t const sizes[] = {size(head_dim), size(seqlen), size(heads), size(batch)};
  cuuint64_t const strides[] = {bytes(operand.seqlen_stride), bytes(operand.head_stride),
                                bytes(operand.batch_stride)};
  cuuint32_t const box[] = {static_cast<cuuint32_t>(slab), static_cast<cuuint32_t>(box_rows), 1, 1};
  cuuint32_t const steps[] = {1, 1, 1, 1};
  CUtensorMapSwizzle const by_slab =
      slab * kBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  CUresult const result =
      encode(map, kBytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 4,
             operand.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle == Swizzle::kBySlab ? by_slab : CU_TENSOR_MAP_SWIZZLE_NONE, promotion,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The first row of a box in a [b, s, h, d] operand.
struct RowCoord {
  int row;
  int head;
  int batch;
};

// Loads one box of rows into a tile of kRows rows; `smem` points at the first of them in the first
// slab, `full` counts the bytes. Always whole slabs: what the array lacks of the last is written as
// 0 and counted.
template <int kRows, int kColumns, int kSlab, class Element>
CUTLASS_DEVICE void tma_load_rows(CUtensorMap const& map, FullBarrier& full,
                                  cute::TMA::CacheHintSm90 hint, Element* smem,
                                  RowCoord const& from, int first_column = 0) {
  CUTLASS_PRAGMA_UNROLL
  for (int column = 0; column < kColumns; column += kSlab) {
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full),
                                 static_cast<uint64_t>(hint), smem + column * kRows,
                                 first_column + column, from.row, from.head, from.batch);
  }
}

// Zeroes a loaded tile's rows from `first` on, by one warp, before wgmma reads them. A row is
// contiguous within its slab, whatever the swizzle.
template <int kRows, int kColumns, int kSlab>
CUTLASS_DEVICE void zero_rows_from(uint16_t* smem, int first) {
  constexpr int kVectors = kSlab / 8;
  for (int slab = 0; slab < in_slabs(kColumns, kSlab) / kSlab; ++slab) {
    auto* const rows = reinterpret_cast<uint4*>(smem + slab * kRows * kSlab);
    for (int i = max(first, 0) * kVectors + threadIdx.x % 32; i < kRows * kVectors; i += 32) {
      rows[i] = uint4{0, 0, 0, 0};
    }
  }
  cutlass::arch::fence_view_async_shared();
  __syncwarp();
}

// Stores one box of rows of such a tile.
template <int kRows, int kColumns, int kSlab>
CUTLASS_DEVICE void tma_store_rows(CUtensorMap const& map, uint16_t const* smem, RowCoord const& to,
                                   int first_column = 0) {
  CUTLASS_PRAGMA_UNROLL
  for (int column = 0; column < kColumns; column += kSlab) {
    cute::SM90_TMA_STORE_4D::copy(&map, smem + column * kRows, first_column + column, to.row,
                                  to.head, to.batch);
  }
}

// Issues the addition of `bytes` of fp32 in shared memory to those in global memory. It belongs to
// the thread's current bulk group, which tma_store_arrive() closes.
CUTLASS_DEVICE void bulk_add_fp32(float* global, float const* smem, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               :
               : "l"(global), "r"(cute::cast_smem_ptr_to_uint(smem)), "r"(bytes)
               : "memory");
}

// Waits until all bulk groups of this thread have written global memory (tma_store_wait() waits
// just until they have read shared memory).
CUTLASS_DEVICE void bulk_wait_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace jax_fa3
