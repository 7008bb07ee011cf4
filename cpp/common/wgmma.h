// The shapes of wgmma that CUTLASS has only among its extended ones, whose header costs 17
// CPU-seconds in every file that turns it on.
#pragma once

#include <cutlass/numeric_types.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <type_traits>

namespace jax_fa3 {

// Where the operands are: both in shared memory, with their columns (K-major) or their rows
// (MN-major) along the sum; or A in registers, and B in shared memory, MN-major.
enum class Operands { kColumns, kRows, kRegisters };

// wgmma m64nNk16.
template <class Element, int kN, Operands kOperands>
struct Wgmma {
  using DRegisters = void;
  using ARegisters =
      std::conditional_t<kOperands == Operands::kRegisters, uint32_t[4], uint64_t[1]>;
  using BRegisters = uint64_t[1];
  using CRegisters = float[kN / 2];
};

// CuTe's hook for issuing an instruction, found through the type of its traits. The operands of the
// asm are numbered by hand: first C, then A, B and the predicate.
template <class Element, int kN, Operands kOperands, class TD, class DLayout, class TA,
          class ALayout, class TB, class BLayout, class TC, class CLayout>
CUTLASS_DEVICE void mma_unpack(cute::MMA_Traits<Wgmma<Element, kN, kOperands>> const& traits,
                               cute::Tensor<TD, DLayout>& d, cute::Tensor<TA, ALayout> const& a,
                               cute::Tensor<TB, BLayout> const& b,
                               cute::Tensor<TC, CLayout> const&) {
  constexpr bool kIsBFloat16 = std::is_same_v<Element, cutlass::bfloat16_t>;
  static_assert(kIsBFloat16 || std::is_same_v<Element, cutlass::half_t>);
  cute::Tensor descriptor_b = cute::recast<uint64_t>(b);
  auto const accumulate = static_cast<int32_t>(traits.accumulate_);

#define JAX_FA3_C_20 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define JAX_FA3_C_24 JAX_FA3_C_20 ", %20, %21, %22, %23"
#define JAX_FA3_C_40 \
  JAX_FA3_C_24 ", %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
#define JAX_FA3_C_56 \
  JAX_FA3_C_40 ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55"
#define JAX_FA3_FLOATS_4(i) "+f"(d(i)), "+f"(d(i + 1)), "+f"(d(i + 2)), "+f"(d(i + 3))
#define JAX_FA3_FLOATS_8(i) JAX_FA3_FLOATS_4(i), JAX_FA3_FLOATS_4(i + 4)
#define JAX_FA3_FLOATS_16(i) JAX_FA3_FLOATS_8(i), JAX_FA3_FLOATS_8(i + 8)
#define JAX_FA3_FLOATS_20 JAX_FA3_FLOATS_16(0), JAX_FA3_FLOATS_4(16)
#define JAX_FA3_FLOATS_24 JAX_FA3_FLOATS_16(0), JAX_FA3_FLOATS_8(16)
#define JAX_FA3_FLOATS_40 JAX_FA3_FLOATS_24, JAX_FA3_FLOATS_16(24)
#define JAX_FA3_FLOATS_56 JAX_FA3_FLOATS_40, JAX_FA3_FLOATS_16(40)
#define JAX_FA3_ISSUE(type, n, half, operands, flags, predicate, ...)                       \
  asm volatile(                                                                             \
      "{\n"                                                                                 \
      ".reg .pred accumulate;\n"                                                            \
      "setp.ne.b32 accumulate, %" #predicate                                                \
      ", 0;\n"                                                                              \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" JAX_FA3_C_##half \
      "}, " operands ", accumulate, 1, 1, " flags                                           \
      ";\n"                                                                                 \
      "}\n"                                                                                 \
      : JAX_FA3_FLOATS_##half                                                               \
      : __VA_ARGS__, "l"(descriptor_b(0)), "r"(accumulate))
#define JAX_FA3_ISSUE_OF_TYPE(...)      \
  if constexpr (kIsBFloat16) {          \
    JAX_FA3_ISSUE("bf16", __VA_ARGS__); \
  } else {                              \
    JAX_FA3_ISSUE("f16", __VA_ARGS__);  \
  }

  if constexpr (kOperands == Operands::kRegisters) {
    static_assert(kN == 80);
    cute::Tensor registers = cute::recast<uint32_t>(a);
    JAX_FA3_ISSUE_OF_TYPE(80, 40, "{%40, %41, %42, %43}, %44", "1", 45, "r"(registers(0)),
                          "r"(registers(1)), "r"(registers(2)), "r"(registers(3)))
  } else {
    cute::Tensor descriptor_a = cute::recast<uint64_t>(a);
    if constexpr (kOperands == Operands::kRows && kN == 40) {
      JAX_FA3_ISSUE_OF_TYPE(40, 20, "%20, %21", "1, 1", 22, "l"(descriptor_a(0)))
    } else if constexpr (kOperands == Operands::kRows) {
      static_assert(kN == 48);
      JAX_FA3_ISSUE_OF_TYPE(48, 24, "%24, %25", "1, 1", 26, "l"(descriptor_a(0)))
    } else if constexpr (kN == 80) {
      JAX_FA3_ISSUE_OF_TYPE(80, 40, "%40, %41", "0, 0", 42, "l"(descriptor_a(0)))
    } else {
      static_assert(kN == 112);
      JAX_FA3_ISSUE_OF_TYPE(112, 56, "%56, %57", "0, 0", 58, "l"(descriptor_a(0)))
    }
  }
#undef JAX_FA3_C_20
#undef JAX_FA3_C_24
#undef JAX_FA3_C_40
#undef JAX_FA3_C_56
#undef JAX_FA3_FLOATS_4
#undef JAX_FA3_FLOATS_8
#undef JAX_FA3_FLOATS_16
#undef JAX_FA3_FLOATS_20
#undef JAX_FA3_FLOATS_24
#undef JAX_FA3_FLOATS_40
#undef JAX_FA3_FLOATS_56
#undef JAX_FA3_ISSUE
#undef JAX_FA3_ISSUE_OF_TYPE
}

namespace detail {

// What CuTe asks of the traits besides: an A operand in registers has no FrgTypeA.
template <Operands kOperands>
struct WgmmaOperands {
  static constexpr cute::GMMA::Major kMajor =
      kOperands == Operands::kColumns ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
  using FrgTypeA = cute::GMMA::smem_desc<kMajor>;
  using FrgTypeB = cute::GMMA::smem_desc<kMajor>;
  using ALayout = cute::GMMA::ABLayout<64, 16>;
};
template <>
struct WgmmaOperands<Operands::kRegisters> {
  using FrgTypeB = cute::GMMA::smem_desc<cute::GMMA::Major::MN>;
  using ALayout = cute::GMMA::ALayout_64x16;
};

}  // namespace detail

}  // namespace jax_fa3

namespace cute {

template <class Element, int kN, jax_fa3::Operands kOperands>
struct MMA_Traits<jax_fa3::Wgmma<Element, kN, kOperands>>
    : jax_fa3::detail::WgmmaOperands<kOperands> {
  using ValTypeD = float;
  using ValTypeA = Element;
  using ValTypeB = Element;
  using ValTypeC = float;
  using Shape_MNK = Shape<_64, Int<kN>, _16>;
  using ThrID = Layout<_128>;
  using BLayout = GMMA::ABLayout<kN, 16>;
  using CLayout = GMMA::CLayout_64xN<kN>;
  GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
};

}  // namespace cute
