// Host side of every launch. Nothing here allocates, synchronises or reads device memory; CUDA
// graphs can capture it.
#pragma once

#include <cuda_runtime_api.h>

namespace jax_fa3 {

#define JAX_FA3_RETURN_IF_ERROR(expression)                           \
  if (cudaError_t const error = (expression); error != cudaSuccess) { \
    return error;                                                     \
  }

// Of the current device.
inline cudaError_t count_sms(int* num_sms) {
  int device = 0;
  JAX_FA3_RETURN_IF_ERROR(cudaGetDevice(&device));
  return cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device);
}

// When a kernel starts: after all before it, or when the CTAs of the one before it have let it
// (cudaTriggerProgrammaticLaunchCompletion) or are done. Then it must wait itself for what it takes
// from them (cudaGridDependencySynchronize).
enum class Start { kAfter, kBeside };

// Not <<<>>>, after which an older call's error cannot be told from this one's.
template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), int64_t num_ctas, int num_threads,
                          int shared_bytes, Params& params, cudaStream_t stream,
                          Start start = Start::kAfter) {
  auto const* const function = reinterpret_cast<void const*>(kernel);
  if (shared_bytes > 0) {  // per device, so not remembered across calls
    JAX_FA3_RETURN_IF_ERROR(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  cudaLaunchAttribute beside{};
  beside.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  beside.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_ctas));
  config.blockDim = dim3(num_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &beside;
  config.numAttrs = start == Start::kBeside;
  void* arguments[] = {&params};
  return cudaLaunchKernelExC(&config, function, arguments);
}

}  // namespace jax_fa3
