// Issuing wgmmas.
#pragma once

#include <cute/tensor.hpp>

namespace jax_fa3 {

// The same descriptors, computed anew where they are used. Otherwise the compiler keeps those of
// every step of a GEMM in registers across the mainloop, two for each, and spills.
template <class Descriptors>
CUTLASS_DEVICE auto recomputed(Descriptors const& operand) {
  auto iterator = operand.data();
  asm volatile("" : "+r"(iterator.desc_.reg32_[0]));
  return cute::make_tensor(iterator, operand.layout());
}

// Issues C += A B as one group of wgmmas. C (and A, if in registers) must not be touched until
// warpgroup_wait(). kSteps: steps of 16 that the sum is over, if not all that the operands have.
template <int kSteps = 0, class Mma, class A, class B, class C>
CUTLASS_DEVICE void issue_gemm(Mma mma, A const& a, B const& b, C& c) {
  using namespace cute;
  constexpr bool kRegistersA = !is_base_of<GMMA::DescriptorIterator, typename Mma::FrgTypeA>::value;
  auto const issue = [&](auto const& a, auto const& b) {
    warpgroup_fence_operand(c);
    warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < (kSteps > 0 ? kSteps : size<2>(a)); ++k) {
      cute::gemm(mma, a(_, _, k), b(_, _, k), c);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
  };
  if constexpr (kRegistersA) {
    warpgroup_fence_operand(const_cast<A&>(a));
    issue(a, recomputed(b));
  } else {
    issue(recomputed(a), recomputed(b));
  }
  warpgroup_commit_batch();
}

// Issues C = A B, as above.
template <int kSteps = 0, class Mma, class A, class B, class C>
CUTLASS_DEVICE void issue_gemm_zero(Mma mma, A const& a, B const& b, C& c) {
  mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
  issue_gemm<kSteps>(mma, a, b, c);
}

// A tile in shared memory as an operand of a warpgroup's GEMMs: its wgmma descriptors. They are the
// same in all threads of the warpgroup, for which its first one stands.
template <class Mma, class Storage, class Layout>
CUTLASS_DEVICE auto operand_a(Mma const& mma, int warpgroup, Storage* smem, Layout layout) {
  auto* const elements = reinterpret_cast<typename Mma::ValTypeA*>(smem);
  return mma.get_slice(warpgroup * 128)
      .partition_fragment_A(cute::make_tensor(cute::make_smem_ptr(elements), layout));
}
template <class Mma, class Storage, class Layout>
CUTLASS_DEVICE auto operand_b(Mma const& mma, int warpgroup, Storage* smem, Layout layout) {
  auto* const elements = reinterpret_cast<typename Mma::ValTypeB*>(smem);
  return mma.get_slice(warpgroup * 128)
      .partition_fragment_B(cute::make_tensor(cute::make_smem_ptr(elements), layout));
}

}  // namespace jax_fa3
