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

// kInOrder: the kernel starts when all work before it in the stream is done.
// kEarly: programmatic dependent launch. It may start while the kernel before it still runs, as
// soon as all CTAs of that one have called cudaTriggerProgrammaticLaunchCompletion() or ended. What
// that one writes may be read only after cudaGridDependencySynchronize().
enum class Start { kInOrder, kEarly };

// Not by <<<>>>, which returns nothing: cudaGetLastError() after it may be the error that an
// earlier call left there.
template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), int64_t num_ctas, int num_threads,
                          int shared_bytes, Params& params, cudaStream_t stream,
                          Start start = Start::kInOrder) {
  auto const* const function = reinterpret_cast<void const*>(kernel);
  if (shared_bytes > 0) {  // per device, so not remembered across calls
    JAX_FA3_RETURN_IF_ERROR(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_ctas));
  config.blockDim = dim3(num_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = start == Start::kEarly;
  void* arguments[] = {&params};
  return cudaLaunchKernelExC(&config, function, arguments);
}

}  // namespace jax_fa3
