// What numbers lose when they are rounded to 16 bits: of each the next 8 bits. With them a
// warpgroup that is handed a 16-bit operand knows the numbers themselves, to 16 bits of mantissa;
// but for those that fp16 keeps as subnormals (below 2^-14), which stay about as rounded, and exact
// ties, one in 2^17 numbers (2^14 in fp16), which may be taken for rounded up and lose a unit. (In
// bf16 there are no subnormals: the exponential makes 0 of them.)
#pragma once

#include "common/fragment.h"

namespace jax_fa3::bwd {

// Bits of an fp32 mantissa behind those that Element keeps.
template <class Element>
inline constexpr int kRestOfMantissa = std::is_same_v<Element, cutlass::bfloat16_t> ? 16 : 13;

CUTLASS_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// Of four numbers, none negative.
template <class Element, class Fragment>
CUTLASS_DEVICE uint32_t lost_bits(Fragment const& x, int i) {
  auto const at = [&](int e) {
    return __float_as_uint(x(i + e)) << (16 - kRestOfMantissa<Element>);
  };
  uint32_t const low = permute_bytes(at(0), at(1), 0x51);
  return permute_bytes(low, permute_bytes(at(2), at(3), 0x51), 0x5410);
}

// One of two numbers that were packed; `lost` of four, of which it is the one at `index`. As
// integers, the bits that were lost are to be added if they are less than half, else what they lack
// is to be subtracted, for then the number was rounded up: they count as a number with a sign.
template <class Element>
CUTLASS_DEVICE float with_lost_bits(uint32_t pair, int half, uint32_t lost, int index) {
  uint32_t const sign = index | 8;
  int const added = permute_bytes(lost, 0, sign << 12 | sign << 8 | index << 4 | 4);
  int const bits = __float_as_int(unpack<Element>(pair, half));
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
    return __int_as_float(bits + added);
  } else {  // which may have become 0
    return __int_as_float(max(bits + (added >> (16 - kRestOfMantissa<Element>)), 0));
  }
}

}  // namespace jax_fa3::bwd
