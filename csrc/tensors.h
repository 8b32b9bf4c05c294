// Tensors and dtypes, as the entry points of the CPU and the CUDA kernels see them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace cdm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The dtype of the arithmetic on elements of a dtype: "Compute" in the comments.
inline ScalarType compute_type(ScalarType type) {
    return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace cdm
