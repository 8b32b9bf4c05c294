// The sum of the rows of a matrix, on the CPU: gradients of parameters from those of each image.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tensors.h"

namespace cdm {

template <class Scalar>
void add_rows(const Tensor& rows, const Tensor& total) {
    const int64_t count = rows.size(0), width = rows.size(1);
    const Scalar* from = static_cast<const Scalar*>(rows.data_ptr());
    Scalar* to = static_cast<Scalar*>(total.data_ptr());
    std::copy(from, from + width, to);
    for (int64_t row = 1; row < count; ++row)
        for (int64_t column = 0; column < width; ++column) to[column] += from[row * width + column];
}

// (B, C) fp32 or fp64 -> (C)
inline Tensor sum_rows(const Tensor& rows) {
    const Tensor total = torch::stable::new_empty(rows, {rows.size(1)});
    if (rows.scalar_type() == ScalarType::Double)
        add_rows<double>(rows, total);
    else
        add_rows<float>(rows, total);
    return total;
}

}  // namespace cdm
