// ffi_arrays.h: the arrays of a call against a target's table: count, dtypes, shapes, memory.
#include "ffi_arrays.h"

#include <algorithm>
#include <iterator>

#include "fp8/fp8.h"

namespace jax_fa3 {
namespace {

struct NamedDType {
  ffi::DataType type;
  DTypes set;
  char const* name;  // in JAX
};
constexpr NamedDType kNamedDTypes[] = {
    {ffi::DataType::BF16, kBFloat16, "bfloat16"},
    {ffi::DataType::F16, kFloat16, "float16"},
    {ffi::DataType::F32, kFloat32, "float32"},
    {ffi::DataType::F8E4M3FN, kFloat8E4M3, "float8_e4m3fn"},
    {ffi::DataType::S32, kInt32, "int32"},
    {ffi::DataType::U32, kUInt32, "uint32"},
    {ffi::DataType::U8, kUInt8, "uint8"},
    {ffi::DataType::PRED, kBool, "bool"},
};

// Calls f with each of the shapes that the spec has to choose from, until it says true.
template <class F>
bool any_shape(Spec const& spec, F const& f) {
  for (std::string_view rest = spec.shape;;) {
    std::size_t const end = std::min(rest.find('|'), rest.size());
    if (f(rest.substr(0, end))) return true;
    if (end == rest.size()) return false;
    rest.remove_prefix(end + 1);
  }
}

bool is_lower(char c) { return c >= 'a' && c <= 'z'; }

constexpr std::size_t kVectorBytes = 16;

ffi::Error check_aligned(Array const& x) {
  if (x.bytes == 0 || reinterpret_cast<std::uintptr_t>(x.data) % kVectorBytes == 0) {
    return ffi::Error::Success();
  }
  return wrong(x, "data that are not aligned", "an address that is a multiple of 16");
}

// Whether TMA or loads of 16 bytes take the rows of an array of rank 4, and its sizes and strides
// fit a descriptor.
ffi::Error check_vectors(Array const& x) {
  constexpr double kMaxStride = 0x1p40;  // in bytes, of a TMA descriptor
  auto const size = static_cast<int64_t>(ffi::ByteWidth(x.dtype));
  double stride = static_cast<double>(size);  // no product of three dimensions can overflow
  for (std::size_t i = 1; i < 4; ++i) stride *= static_cast<double>(x.dims[i]);
  if (*std::max_element(x.dims.begin(), x.dims.end()) > INT32_MAX || stride >= kMaxStride) {
    return wrong(x, "shape " + shape_of(x), "dimensions and strides that fit a TMA descriptor");
  }
  if (x.dims[3] * size % static_cast<int64_t>(kVectorBytes) != 0) {
    return wrong(x, "shape " + shape_of(x), "rows that are whole multiples of 16 bytes");
  }
  return check_aligned(x);
}

std::string shape_of(ffi::Span<int64_t const> dims) {
  std::string text;
  for (int64_t const dim : dims) {
    text += (text.empty() ? "[" : ", ") + std::to_string(dim);
  }
  return text.empty() ? "[]" : text + "]";
}

}  // namespace

ffi::Error invalid(std::string const& message) {
  return ffi::Error::InvalidArgument("jax_fa3: " + message);
}

ffi::Error wrong(Array const& x, std::string const& found, std::string const& wanted) {
  return invalid(std::string(x.name) + ": got " + found + ", wanted " + wanted);
}

std::string shape_of(Array const& x) { return shape_of(x.dims); }

std::vector<std::string> names_of(DTypes dtypes) {
  std::vector<std::string> names;
  for (NamedDType const& known : kNamedDTypes) {
    if ((known.set & dtypes) != 0) names.push_back(known.name);
  }
  return names;
}

int64_t Dims::operator()(char letter) const {
  if (letter == '0' || letter == '1') return letter - '0';
  if (is_lower(letter)) return sizes_[letter - 'a'];
  char const lower = static_cast<char>(letter - 'A' + 'a');
  int64_t const size = is_lower(lower) ? sizes_[lower - 'a'] : -1;
  return size < 0 ? -1 : size / fp8::kBlock + (size % fp8::kBlock != 0);
}

ffi::Error Dims::check_shape(Spec const& spec, Array const& x) {
  if (spec.shape.front() == '*') return check_aligned(x);
  auto const is_right = [&](char letter, int64_t size) {
    int64_t const known = (*this)(letter);
    return known < 0 || known == size;
  };
  bool const found = any_shape(spec, [&](std::string_view shape) {
    auto const* const dims = x.dims.begin();
    if (!std::equal(shape.begin(), shape.end(), dims, x.dims.end(), is_right)) return false;
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (is_lower(shape[i])) set(shape[i], dims[i]);
    }
    return true;
  });
  if (found) return x.dims.size() == 4 ? check_vectors(x) : ffi::Error::Success();
  std::string wanted;
  any_shape(spec, [&](std::string_view shape) {
    std::string text;
    for (char const letter : shape) {
      int64_t const size = (*this)(letter);
      text += text.empty() ? "[" : ", ";
      text += size >= 0 ? std::to_string(size) : std::string(1, letter == '.' ? '*' : letter);
    }
    wanted += (wanted.empty() ? "" : " or ") + text + "]";
    return false;
  });
  return wrong(x, "shape " + shape_of(x), wanted);
}

ffi::Error Dims::check_dtype(Spec const& spec, Array const& x) {
  auto const is_its = [&](NamedDType const& known) { return known.type == x.dtype; };
  auto const* const end = std::end(kNamedDTypes);
  auto const* const found = std::find_if(std::begin(kNamedDTypes), end, is_its);
  auto const wanted = static_cast<DTypes>(spec.dtypes & (~k16Bits | dtype_of_16_bits_));
  if (found != end && (found->set & wanted) != 0) {
    if ((found->set & k16Bits) != 0) dtype_of_16_bits_ = found->set;
    return ffi::Error::Success();
  }
  std::string names;
  for (std::string const& name : names_of(wanted)) {
    names += (names.empty() ? "" : " or ") + name;
  }
  return wrong(x, found == end ? "another dtype" : found->name, names);
}

namespace detail {

ffi::Error check_count(char const* target, char const* kind, std::size_t found,
                       std::size_t wanted) {
  if (found == wanted) return ffi::Error::Success();
  return invalid(std::string(target) + ": got " + std::to_string(found) + " " + kind + ", wanted " +
                 std::to_string(wanted));
}

ffi::Error decode(Spec const& spec, ffi::AnyBuffer const* buffer, Dims* dims, Array* array) {
  array->name = spec.name;
  if (buffer == nullptr) return wrong(*array, "no buffer", "one");
  array->dims = buffer->dimensions();
  array->dtype = buffer->element_type();
  JAX_FA3_RETURN_IF_FAILED(dims->check_dtype(spec, *array));
  array->bytes = buffer->size_bytes();
  bool const is_absent = spec.is_optional() && array->is_absent();
  array->data = is_absent ? nullptr : buffer->untyped_data();
  return dims->check_shape(spec, *array);
}

ffi::Error check_apart(Array const& written, Array const& other, Spec const& spec_of_other) {
  auto const* const a = static_cast<char const*>(written.data);
  auto const* const b = static_cast<char const*>(other.data);
  if (written.bytes == 0 || other.bytes == 0 || a >= b + other.bytes || b >= a + written.bytes) {
    return ffi::Error::Success();
  }
  if (spec_of_other.becomes == written.name && a == b && written.bytes == other.bytes) {
    return ffi::Error::Success();
  }
  return wrong(written, std::string("memory of ") + other.name, "memory of its own");
}

}  // namespace detail
}  // namespace jax_fa3
