// The arrays of XLA's calls. Each target has one table of them (ffi_targets.h), by which they are
// decoded into slots with names: no handler knows a position. What the table says is checked here,
// before anything is launched: a bare custom call, or an old exported program, may come with any
// array, and a kernel that is given a wrong one takes the process's GPU context with it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

namespace ffi = xla::ffi;

ffi::Error invalid(std::string const& message);

#define JAX_FA3_RETURN_IF_FAILED(expression)              \
  if (ffi::Error error = (expression); error.failure()) { \
    return error;                                         \
  }

// Sets of dtypes.
enum DTypes : unsigned {
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat32 = 4,
  kFloat8E4M3 = 8,
  kInt32 = 16,
  kUInt32 = 32,
  kUInt8 = 64,
  kBool = 128,
  k16Bits = kBFloat16 | kFloat16,
  k16BitsOrWords = k16Bits | kUInt32,  // a word is two numbers of 16 bits
  k16BitsOrFloat32 = k16Bits | kFloat32,
  k16BitsOrE4M3 = k16Bits | kFloat8E4M3,
  k16BitsOrOther = k16Bits | kFloat8E4M3 | kFloat32,
};
std::vector<std::string> names_of(DTypes dtypes);

// What is known of an array beforehand.
struct Spec {
  char const* name;
  DTypes dtypes;  // arrays of 16 bits must all have the same dtype
  // One character for each dimension:
  //   a lower-case letter: a size, the same wherever the letter stands in the call's table
  //   an upper-case letter: the blocks of fp8::kBlock that this size has
  //   1: one    .: any size
  // Several such shapes have | between them; 0, the last, is that of an array that is absent. Rows
  // of arrays of rank 4 must be whole vectors of 16 bytes. With * alone it is workspace of any
  // shape, whose size is for the handler to check.
  std::string_view shape;
  std::string_view becomes = {};  // of an operand: the result that may be in the same memory

  bool is_optional() const { return shape.size() > 2 && shape.substr(shape.size() - 2) == "|0"; }
};

// An array of the call.
struct Array {
  char const* name = "";
  void* data = nullptr;  // also null where an optional array is absent
  std::size_t bytes = 0;
  ffi::Span<int64_t const> dims;
  ffi::DataType dtype = ffi::DataType::INVALID;

  bool is_absent() const { return bytes == 0; }
  int64_t size() const { return static_cast<int64_t>(bytes / ffi::ByteWidth(dtype)); }
  float* floats() const { return static_cast<float*>(data); }
  uint32_t* words() const { return static_cast<uint32_t*>(data); }
  int* ints() const { return static_cast<int*>(data); }
};

std::string shape_of(Array const& x);
ffi::Error wrong(Array const& x, std::string const& found, std::string const& wanted);

// What the arrays of one call have in common: sizes by their letters, and which dtype has 16 bits.
class Dims {
 public:
  Dims() { sizes_.fill(-1); }
  int64_t operator()(char letter) const;  // -1: not known yet
  void set(char letter, int64_t size) { sizes_[letter - 'a'] = size; }

  // Takes what is not known yet from the array, and checks the rest.
  ffi::Error check_shape(Spec const& spec, Array const& x);
  ffi::Error check_dtype(Spec const& spec, Array const& x);

 private:
  static constexpr int kLetters = 26;
  std::array<int64_t, kLetters> sizes_;
  DTypes dtype_of_16_bits_ = k16Bits;
};

template <class Arrays>
struct Slot {
  Spec spec;
  Array Arrays::* array;
};

// A target's table. Arrays: a struct of all its arrays.
template <class Arrays>
struct Target {
  char const* name;
  std::vector<Slot<Arrays>> operands, results;
};

namespace detail {

ffi::Error check_count(char const* target, char const* kind, std::size_t found, std::size_t wanted);
// No buffer: what XLA gave is none.
ffi::Error decode(Spec const& spec, ffi::AnyBuffer const* buffer, Dims* dims, Array* array);
ffi::Error check_apart(Array const& written, Array const& other, Spec const& spec_of_other);

template <class Arrays>
ffi::Error check_apart(Target<Arrays> const& target, Arrays const& arrays) {
  for (std::size_t i = 0; i < target.results.size(); ++i) {
    Array const& written = arrays.*target.results[i].array;
    for (Slot<Arrays> const& slot : target.operands) {
      JAX_FA3_RETURN_IF_FAILED(check_apart(written, arrays.*slot.array, slot.spec));
    }
    for (std::size_t j = i + 1; j < target.results.size(); ++j) {
      Slot<Arrays> const& slot = target.results[j];
      JAX_FA3_RETURN_IF_FAILED(check_apart(written, arrays.*slot.array, slot.spec));
    }
  }
  return ffi::Error::Success();
}

}  // namespace detail

// Fills the slots; refuses what is not as the table says.
template <class Arrays>
ffi::Error unpack(Target<Arrays> const& target, ffi::RemainingArgs const& operands,
                  ffi::RemainingRets const& results, Dims* dims, Arrays* arrays) {
  JAX_FA3_RETURN_IF_FAILED(
      detail::check_count(target.name, "operands", operands.size(), target.operands.size()));
  JAX_FA3_RETURN_IF_FAILED(
      detail::check_count(target.name, "results", results.size(), target.results.size()));
  for (std::size_t i = 0; i < operands.size(); ++i) {
    auto const buffer = operands.template get<ffi::AnyBuffer>(i);
    Slot<Arrays> const& slot = target.operands[i];
    JAX_FA3_RETURN_IF_FAILED(detail::decode(slot.spec, buffer.has_value() ? &*buffer : nullptr,
                                            dims, &(arrays->*slot.array)));
  }
  for (std::size_t i = 0; i < results.size(); ++i) {
    auto buffer = results.template get<ffi::AnyBuffer>(i);
    Slot<Arrays> const& slot = target.results[i];
    JAX_FA3_RETURN_IF_FAILED(detail::decode(slot.spec, buffer.has_value() ? &**buffer : nullptr,
                                            dims, &(arrays->*slot.array)));
  }
  return detail::check_apart(target, *arrays);
}

}  // namespace jax_fa3
