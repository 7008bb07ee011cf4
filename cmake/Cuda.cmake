# Finds CUDA: the runtime (CUDA::cudart_static, with its headers) and, for JAX_FA3_CUDA, nvcc.
if(NOT JAX_FA3_SYSTEM_CUDA)
  # The nvcc wheels share one folder, which is laid out like a toolkit but for two things:
  python_package_path(JAX_FA3_CUDA_WHEELS nvidia-cuda-nvcc nvidia/cu13)
  set(CUDAToolkit_ROOT "${JAX_FA3_CUDA_WHEELS}")
  set(CMAKE_CUDA_COMPILER "${JAX_FA3_CUDA_WHEELS}/bin/nvcc")
  # nvcc.profile says lib64, the wheels have lib;
  string(APPEND CMAKE_CUDA_FLAGS_INIT " -L${JAX_FA3_CUDA_WHEELS}/lib")
  # libcudart.so, which nothing links but FindCUDAToolkit wants to see, is libcudart.so.13.
  set(CUDA_CUDART "${JAX_FA3_CUDA_WHEELS}/lib/libcudart.so.13")
endif()

if(JAX_FA3_CUDA)
  set(CMAKE_CUDA_ARCHITECTURES 90a-real)  # machine code of sm_90a and no PTX: nothing is JIT-compiled
  enable_language(CUDA)
endif()
find_package(CUDAToolkit 12.8 REQUIRED)
