// The handlers that ffi.cc and the other ffi_*.cc define and bindings.cc hands to Python.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* jax_fa3_fwd(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_bwd(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_bwd_packed(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_fwd_fp8(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_quantize(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_mask_bits(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_segment_intervals(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_decode(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_append(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_append_and_attend(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_jvp(XLA_FFI_CallFrame* call_frame);
}
