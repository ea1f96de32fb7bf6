// XLA's handlers of the kernels; see fqt_jax/kernels/native.py for their operands.
#pragma once

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(FqtForward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FqtInputGrad);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FqtWeightGrad);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FqtMoments);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FqtEncode);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FqtActivate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FqtGradientSums);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FqtGradient);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FqtEncodeWeights);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FqtAdam);
