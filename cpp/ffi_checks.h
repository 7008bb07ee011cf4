// What a handler checks of the buffers that XLA hands over, before anything is launched: a bare
// custom call, or an old exported program, may come with any shape. A kernel that is given a wrong
// one takes the process's GPU context with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

namespace ffi = xla::ffi;

ffi::Error invalid(std::string const& message);

#define JAX_FA3_RETURN_IF_FAILED(expression)              \
  if (ffi::Error error = (expression); error.failure()) { \
    return error;                                         \
  }

// A buffer, as far as it is checked.
struct View {
  char const* name;
  void const* data;
  std::size_t bytes;
  ffi::Span<int64_t const> dims;
  ffi::DataType dtype;
};

template <class Buffer>
View view(char const* name, Buffer& buffer) {
  return {name, buffer.untyped_data(), buffer.size_bytes(), buffer.dimensions(),
          buffer.element_type()};
}

// Optional operands and results have no elements when absent.
template <class Buffer>
bool is_absent(Buffer const& buffer) {
  return buffer.element_count() == 0;
}

std::string shape_of(ffi::Span<int64_t const> dims);

template <class Buffer>
std::string shape_of(Buffer const& buffer) {
  return shape_of(buffer.dimensions());
}

ffi::Error check_shape(View const& x, std::initializer_list<int64_t> wanted);
// Or [0], where it is absent.
ffi::Error check_optional(View const& x, std::initializer_list<int64_t> wanted);
// out or another array like it, [b, t, n, v], whose rows are read or written 16 bytes at a time.
ffi::Error check_out(Problem const& p, View const& x);
// The log-sum-exp or another array like it, [b, n, t].
ffi::Error check_rows(Problem const& p, View const& x);

// Whether the data are where TMA and loads of 16 bytes take them.
ffi::Error check_aligned(View const& x);
// An array of rank 4, whose rows (from byte `first_byte` of each on) TMA or loads of 16 bytes
// take, and whose sizes and strides fit a descriptor.
ffi::Error check_vectors(View const& x, int64_t first_byte = 0);

// Kernels write results while others of their CTAs read operands. An empty View is none.
ffi::Error check_apart(std::initializer_list<View> written, std::initializer_list<View> read);

}  // namespace jax_fa3
