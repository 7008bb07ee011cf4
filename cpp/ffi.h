// The handlers that ffi.cc defines and bindings.cc hands to Python.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* jax_fa3_fwd(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_bwd(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_bwd_packed(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_fa3_segment_intervals(XLA_FFI_CallFrame* call_frame);
}
