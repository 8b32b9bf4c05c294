// Element types of the CPU kernels: fp64, fp32 and bf16.
#pragma once

#include <string>

#include "bf16.h"
#include "tensors.h"

namespace cdm {

// The type of the arithmetic on elements of type T: float, or double for double.
template <class T>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// Calls f(a value of the C++ type of `type`); throws for a dtype that has no CPU kernels.
template <class F>
void with_cpu_type(const char* op, ScalarType type, const F& f) {
    switch (type) {
        case ScalarType::Double:
            return f(double());
        case ScalarType::Float:
            return f(float());
        case ScalarType::BFloat16:
            return f(bf16());
        default:
            STD_TORCH_CHECK(false, std::string(op) + ": the CPU kernels take float64, float32 and bfloat16");
    }
}

}  // namespace cdm
