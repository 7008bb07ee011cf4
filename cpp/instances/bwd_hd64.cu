#include "bwd/launch.h"

namespace jax_fa3::bwd {

#ifdef JAX_FA3_HAS_BFLOAT16
template cudaError_t launch<DType::kBFloat16, 64, 64>(BackwardProblem const&, cudaStream_t);
#endif
#ifdef JAX_FA3_HAS_FLOAT16
template cudaError_t launch<DType::kFloat16, 64, 64>(BackwardProblem const&, cudaStream_t);
#endif

}  // namespace jax_fa3::bwd
