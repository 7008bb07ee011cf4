#include "fp8/launch.h"

namespace jax_fa3::fp8 {

template cudaError_t launch_fwd<64>(Problem const&, cudaStream_t);

}  // namespace jax_fa3::fp8
