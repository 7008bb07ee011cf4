// XLA's call that makes bits of a dense mask.
#include "ffi.h"
#include "ffi_call.h"
#include "mask_bits.h"
#include "plan.h"

namespace jax_fa3 {

struct MaskBitsAttributes {
  int64_t rows_are_keys;      // of the bits: 0 for the forward, 1 for the backward
  int64_t columns_per_block;  // 64 or 128
  int64_t num_keys;           // of intervals
};

namespace {

// A size of the mask to that of the bits' rows or columns: in whole blocks, or 1 for all.
int64_t in_blocks(int64_t size) { return size == 1 ? 1 : ceil_div(size, kMaskBlock); }

ffi::Error mask_bits_impl(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                          MaskBitsAttributes attributes) {
  Dims dims;
  BitsOfMask x;
  JAX_FA3_RETURN_IF_FAILED(unpack(kMaskBits, operands, results, &dims, &x));
  int64_t const width = attributes.columns_per_block;
  if (width != 64 && width != kMaskBlock) {
    return invalid("columns_per_block: got " + std::to_string(width) + ", wanted 64 or 128");
  }
  bool const of_intervals = x.mask.dims.size() != 4;
  Array const& given = of_intervals ? x.intervals : x.mask;
  Array const& other = of_intervals ? x.mask : x.intervals;
  if (given.dims.size() != 4) return wrong(given, "shape " + shape_of(given), "[*, *, *, *]");
  JAX_FA3_RETURN_IF_FAILED(dims.check_shape({other.name, kInt32, "0"}, other));
  if (of_intervals && (given.dims[1] != 1 || given.dims[3] % 2 != 0 || given.dims[3] == 0 ||
                       given.dims[3] > 2 * kMostIntervals)) {
    return wrong(given, "shape " + shape_of(given), "[*, 1, *, up to 4 begins and ends]");
  }
  int64_t const batch = given.dims[0];
  int64_t const heads = given.dims[1];
  int64_t const query_rows = given.dims[2];
  int64_t const keys = of_intervals ? attributes.num_keys : given.dims[3];
  if (keys != attributes.num_keys && keys != 1) {
    return wrong(given, "shape " + shape_of(given), "num_keys or 1 column");
  }
  for (int64_t const size : {batch, heads, query_rows, keys}) {
    if (size < 0 || size > INT32_MAX - 256) {
      return invalid(std::string(given.name) + " " + shape_of(given) + " is too large");
    }
  }
  bool const transposed = attributes.rows_are_keys != 0;
  int64_t const rows = transposed ? keys : query_rows;
  int64_t const columns = transposed ? query_rows : keys;
  int64_t const of_row = rows == 1 ? 0 : (transposed ? 1 : keys);
  int64_t const of_column = columns == 1 ? 0 : (transposed ? keys : 1);
  int64_t const chunks = in_blocks(columns);
  int64_t const words = ceil_div(chunks * kMaskBlock / width, 32);
  int64_t const all_rows = rows == 1 ? 1 : in_blocks(rows) * kMaskBlock;
  dims.set('b', batch);
  dims.set('n', heads);
  dims.set('r', all_rows);
  dims.set('c', chunks * 4);
  dims.set('g', in_blocks(rows));
  dims.set('w', words);
  dims.set('p', 2);
  JAX_FA3_RETURN_IF_FAILED(dims.check_shape({x.bits.name, kUInt32, "bnrc"}, x.bits));
  JAX_FA3_RETURN_IF_FAILED(dims.check_shape({x.blocks.name, kUInt32, "bngwp"}, x.blocks));
  if (batch * heads > INT32_MAX / (in_blocks(rows) + 1)) {
    return wrong(given, "shape " + shape_of(given), "fewer rows");
  }
  if (x.bits.is_absent()) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  DenseMaskToBits problem{};
  problem.mask = static_cast<uint8_t const*>(x.mask.data);
  problem.intervals = x.intervals.ints();
  problem.num_intervals = of_intervals ? static_cast<int>(given.dims[3] / 2) : 0;
  problem.rows_are_keys = transposed;
  problem.batch = static_cast<int>(batch);
  problem.num_heads = static_cast<int>(heads);
  problem.rows = static_cast<int>(rows);
  problem.columns = static_cast<int>(columns);
  problem.mask_of_batch = heads * query_rows * keys;
  problem.mask_of_head = query_rows * keys;
  problem.mask_of_row = of_row;
  problem.mask_of_column = of_column;
  problem.bits = static_cast<uint32_t*>(x.bits.data);
  problem.blocks = static_cast<uint32_t*>(x.blocks.data);
  problem.chunks = static_cast<int>(chunks);
  problem.words = static_cast<int>(words);
  problem.blocks_of_chunk = static_cast<int>(kMaskBlock / width);
  return cuda_status(launch_mask_bits(problem, *stream));
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::MaskBitsAttributes,
                                      xla::ffi::StructMember<int64_t>("rows_are_keys"),
                                      xla::ffi::StructMember<int64_t>("columns_per_block"),
                                      xla::ffi::StructMember<int64_t>("num_keys"));

JAX_FA3_HANDLER(jax_fa3_mask_bits, jax_fa3::mask_bits_impl, .Attrs<jax_fa3::MaskBitsAttributes>());
