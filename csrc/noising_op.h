// Entry points of `noising`, for CPU and CUDA: they allocate results and pass pointers to the kernels.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "noising.h"
#include "tensors.h"

namespace cdm {

// Whether images (B, C, H, W) lie in memory as (B, H, W, C), and not as (B, C, H, W) as well.
inline bool has_channels_last(const Tensor& x) {
    if (x.dim() != 4 || x.is_contiguous()) return false;
    int64_t expected = 1;
    for (int64_t axis : {1, 3, 2, 0}) {
        if (x.size(axis) != 1 && x.stride(axis) != expected) return false;
        expected *= x.size(axis);
    }
    return true;
}

// An empty tensor of x's shape and layout.
inline Tensor new_empty_like(const Tensor& x, ScalarType type) {
    if (!has_channels_last(x)) return torch::stable::new_empty(x, x.sizes(), type);
    const Tensor pixels = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(3), x.size(1)}, type);
    return torch::stable::transpose(torch::stable::transpose(pixels, 2, 3), 1, 2);
}

// Allocates the results, fills them by launch(arguments, dtype of x0, dtype of x_t); results that were not
// requested are empty. x0, and eps like it, are contiguous or have their channels last. The schema is in
// cdm_fast/ops/noising.py.
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> noising_op(const Tensor& x0, const Tensor& level, const Tensor& a,
                                              const Tensor& s, const std::optional<Tensor>& seed,
                                              const std::optional<Tensor>& eps, int64_t num_grey_levels,
                                              bool flip, ScalarType dtype, const Launch& launch) {
    const auto like_x0 = [&](ScalarType type, bool wanted) {
        return wanted ? new_empty_like(x0, type) : torch::stable::new_empty(x0, {0}, type);
    };
    const auto pointer = [](const std::optional<Tensor>& tensor) {
        return tensor.has_value() ? tensor->data_ptr() : nullptr;
    };
    const ScalarType compute = a.scalar_type();
    const Tensor x_t = like_x0(dtype, true);
    const Tensor drawn = like_x0(compute, !eps.has_value());
    const Tensor clean = like_x0(compute, flip || num_grey_levels > 0);

    NoisingArguments arguments{};
    arguments.x0 = x0.data_ptr();
    arguments.level = static_cast<const int64_t*>(level.data_ptr());
    arguments.a = a.data_ptr();
    arguments.s = s.data_ptr();
    arguments.seed = static_cast<const int64_t*>(pointer(seed));
    arguments.eps_given = pointer(eps);
    arguments.x_t = x_t.data_ptr();
    arguments.eps_drawn = eps.has_value() ? nullptr : drawn.data_ptr();
    arguments.x0_out = flip || num_grey_levels > 0 ? clean.data_ptr() : nullptr;
    arguments.size = x0.numel();
    arguments.image_size = arguments.size / x0.size(0);
    arguments.row = x0.size(x0.dim() - 1);
    arguments.channels = has_channels_last(x0) ? x0.size(1) : 1;
    arguments.num_levels = a.size(0);
    arguments.scale =
        num_grey_levels > 0 ? static_cast<float>(2.0 / static_cast<double>(num_grey_levels)) : 0.0f;
    arguments.flip = flip;
    launch(arguments, x0.scalar_type(), dtype);
    return {x_t, drawn, clean};
}

}  // namespace cdm
