# The kernels, one object library. cmake/nvcc.py stands before every nvcc (and before ccache, if a
# developer asks for it with CMAKE_CUDA_COMPILER_LAUNCHER): it reports registers, spills and time.
python_package_path(CUTLASS_INCLUDE nvidia-cutlass cutlass_library/source/include)

# Memory is counted as 7 GB a file, the bar; -DJAX_FA3_NVCC_JOBS=N overrules it.
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
cmake_host_system_information(RESULT megabytes QUERY TOTAL_PHYSICAL_MEMORY)
math(EXPR jobs "${megabytes} / 7000")
if(jobs GREATER cores)
  set(jobs ${cores})
elseif(jobs LESS 1)
  set(jobs 1)
endif()
set(JAX_FA3_NVCC_JOBS ${jobs} CACHE STRING "nvcc processes at a time")
set_property(GLOBAL APPEND PROPERTY JOB_POOLS nvcc=${JAX_FA3_NVCC_JOBS})
message(STATUS "jax_fa3: ${JAX_FA3_NVCC_JOBS} nvcc at a time, up to a minute for each file")

set(wrapper "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/nvcc.py")
set(launcher ${wrapper} compile)
if(JAX_FA3_STRICT)
  list(APPEND launcher --strict "${CMAKE_CURRENT_SOURCE_DIR}/cmake/strict_allow.txt")
endif()
list(APPEND launcher -- ${CMAKE_CUDA_COMPILER_LAUNCHER})

add_library(kernels OBJECT ${kernel_sources})
target_include_directories(kernels PRIVATE cpp)
target_include_directories(kernels SYSTEM PRIVATE ${CUTLASS_INCLUDE})
target_compile_definitions(kernels PRIVATE ${definitions})
target_compile_options(kernels PRIVATE
  --expt-relaxed-constexpr --use_fast_math --compress-mode=size -Xptxas=-v)
set_target_properties(kernels PROPERTIES
  CUDA_COMPILER_LAUNCHER "${launcher}"
  JOB_POOL_COMPILE nvcc)

target_link_libraries(_C PRIVATE kernels)
add_custom_command(TARGET _C POST_BUILD
  COMMAND ${wrapper} summary $<TARGET_OBJECTS:kernels> COMMAND_EXPAND_LISTS VERBATIM)
