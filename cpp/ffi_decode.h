// What the calls that attend to a cache share.
#pragma once

#include "ffi_cache.h"
#include "ffi_call.h"

namespace jax_fa3 {

struct DecodeAttributes {
  float scale;
  float soft_cap;
  int64_t window_left, window_right;
  int64_t num_heads_q, num_heads_k;
  int64_t head_dim_v;
  int64_t kv_layout;
  int64_t split_size;
};
// The same for XLA_FFI_REGISTER_STRUCT_ATTR_DECODING.
#define JAX_FA3_DECODE_ATTRIBUTES                                                                  \
  xla::ffi::StructMember<float>("scale"), xla::ffi::StructMember<float>("soft_cap"),               \
      xla::ffi::StructMember<int64_t>("window_left"),                                              \
      xla::ffi::StructMember<int64_t>("window_right"),                                             \
      xla::ffi::StructMember<int64_t>("num_heads_q"),                                              \
      xla::ffi::StructMember<int64_t>("num_heads_k"),                                              \
      xla::ffi::StructMember<int64_t>("head_dim_v"), xla::ffi::StructMember<int64_t>("kv_layout"), \
      xla::ffi::StructMember<int64_t>("split_size")

// In front of `unpack`.
ffi::Error check_attributes(DecodeAttributes const& attributes, Dims* dims);
// All of it, checked.
ffi::Error to_problem(Decoding const& x, DecodeAttributes const& attributes, Dims const& dims,
                      Cache* cache, decode::Problem* problem);
ffi::Error launch(decode::Problem const& problem, cudaStream_t stream);

}  // namespace jax_fa3
