#include "ffi_checks.h"

#include <algorithm>

namespace jax_fa3 {

ffi::Error invalid(std::string const& message) {
  return ffi::Error::InvalidArgument("jax_fa3: " + message);
}

namespace {

constexpr std::size_t kVectorBytes = 16;

ffi::Error wrong(View const& x, std::string const& found, std::string const& wanted) {
  return invalid(std::string(x.name) + ": got " + found + ", wanted " + wanted);
}

bool has_shape(View const& x, std::initializer_list<int64_t> wanted) {
  return std::equal(x.dims.begin(), x.dims.end(), wanted.begin(), wanted.end());
}

bool overlap(View const& x, View const& y) {
  auto const* const a = static_cast<char const*>(x.data);
  auto const* const b = static_cast<char const*>(y.data);
  return x.bytes > 0 && y.bytes > 0 && a < b + y.bytes && b < a + x.bytes;
}

}  // namespace

std::string shape_of(ffi::Span<int64_t const> dims) {
  std::string text;
  for (int64_t const dim : dims) {
    text += (text.empty() ? "[" : ", ") + std::to_string(dim);
  }
  return text.empty() ? "[]" : text + "]";
}

ffi::Error check_shape(View const& x, std::initializer_list<int64_t> wanted) {
  if (has_shape(x, wanted)) return ffi::Error::Success();
  return wrong(x, "shape " + shape_of(x.dims), shape_of({wanted.begin(), wanted.size()}));
}

ffi::Error check_optional(View const& x, std::initializer_list<int64_t> wanted) {
  return has_shape(x, {0}) ? ffi::Error::Success() : check_shape(x, wanted);
}

ffi::Error check_out(Problem const& p, View const& x) {
  JAX_FA3_RETURN_IF_FAILED(check_shape(x, {p.batch, p.seqlen_q, p.num_heads_q, p.head_dim_v}));
  return check_vectors(x);
}

ffi::Error check_rows(Problem const& p, View const& x) {
  return check_shape(x, {p.batch, p.num_heads_q, p.seqlen_q});
}

ffi::Error check_aligned(View const& x) {
  if (x.bytes == 0 || reinterpret_cast<std::uintptr_t>(x.data) % kVectorBytes == 0) {
    return ffi::Error::Success();
  }
  return wrong(x, "data that are not aligned", "an address that is a multiple of 16");
}

ffi::Error check_vectors(View const& x, int64_t first_byte) {
  constexpr double kMaxStride = 0x1p40;  // in bytes, of a TMA descriptor
  if (x.dims.size() != 4) return wrong(x, "shape " + shape_of(x.dims), "rank 4");
  auto const size = static_cast<int64_t>(ffi::ByteWidth(x.dtype));
  double stride = static_cast<double>(size);  // no product of three dimensions can overflow
  for (std::size_t i = 1; i < 4; ++i) stride *= static_cast<double>(x.dims[i]);
  if (*std::max_element(x.dims.begin(), x.dims.end()) > INT32_MAX || stride >= kMaxStride) {
    return wrong(x, "shape " + shape_of(x.dims),
                 "dimensions and strides that fit a TMA descriptor");
  }
  constexpr auto kVector = static_cast<int64_t>(kVectorBytes);
  if (x.dims[3] * size % kVector != 0 || first_byte % kVector != 0) {
    return wrong(
        x,
        "shape " + shape_of(x.dims) + " with rows from byte " + std::to_string(first_byte) + " on",
        "whole multiples of 16 bytes");
  }
  return check_aligned(x);
}

ffi::Error check_apart(std::initializer_list<View> written, std::initializer_list<View> read) {
  for (View const* x = written.begin(); x != written.end(); ++x) {
    auto const clashes = [&](View const& y) { return overlap(*x, y); };
    View const* other = std::find_if(read.begin(), read.end(), clashes);
    if (other == read.end()) {
      other = std::find_if(x + 1, written.end(), clashes);
      if (other == written.end()) continue;
    }
    return wrong(*x, std::string("memory of ") + other->name, "memory of its own");
  }
  return ffi::Error::Success();
}

}  // namespace jax_fa3
