// Entry points of `denoise`, for CPU and CUDA: they allocate results and pass pointers to the kernels.
//
// A backend gives a struct `Launch` with one static function per kernel: f(arguments, dtype of grad_x or of
// the weight, a tensor on the device). The schemas are in cdm_fast/ops/denoise.py.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "denoise.h"
#include "tensors.h"

namespace cdm {

inline DenoiseArguments denoise_arguments(const Tensor& grad_x, const Tensor& x, const Tensor& s_t,
                                          const Tensor& out) {
    DenoiseArguments arguments{};
    arguments.grad_x = grad_x.data_ptr();
    arguments.x = x.data_ptr();
    arguments.s_t = s_t.data_ptr();
    arguments.out = out.data_ptr();
    arguments.batch = grad_x.size(0);
    arguments.image_size = grad_x.numel() / grad_x.size(0);
    return arguments;
}

inline CotangentArguments cotangent_arguments(const Tensor& weight_c, const Tensor& level,
                                              const std::optional<Tensor>& class_weight) {
    CotangentArguments arguments{};
    arguments.weight = weight_c.data_ptr();
    arguments.level = static_cast<const int64_t*>(level.data_ptr());
    arguments.class_weight = class_weight.has_value() ? class_weight->data_ptr() : nullptr;
    arguments.batch = level.size(0);
    arguments.num_rows = weight_c.size(0);
    arguments.num_features = weight_c.size(1);
    arguments.num_classes = class_weight.has_value() ? class_weight->size(1) : 1;
    return arguments;
}

template <typename Launch>
struct DenoiseOps {
    static Tensor epilogue(const Tensor& grad_x, const Tensor& x, const Tensor& s_t) {
        const Tensor out = torch::stable::empty_like(x);
        Launch::epilogue(denoise_arguments(grad_x, x, s_t, out), grad_x.scalar_type(), grad_x);
        return out;
    }

    static Tensor x0(const Tensor& grad_x, const Tensor& x, const Tensor& a_t, const Tensor& s_t) {
        const Tensor out = torch::stable::empty_like(x);
        DenoiseArguments arguments = denoise_arguments(grad_x, x, s_t, out);
        arguments.a_t = a_t.data_ptr();
        Launch::x0(arguments, grad_x.scalar_type(), grad_x);
        return out;
    }

    static Tensor loss(const Tensor& grad_x, const Tensor& x, const Tensor& s_t, const Tensor& eps) {
        const Tensor out = torch::stable::empty_like(s_t);
        DenoiseArguments arguments = denoise_arguments(grad_x, x, s_t, out);
        arguments.eps = eps.data_ptr();
        Launch::loss(arguments, grad_x.scalar_type(), grad_x);
        return out;
    }

    static Tensor loss_backward(const Tensor& grad_x, const Tensor& x, const Tensor& s_t, const Tensor& eps,
                                const Tensor& grad_sum) {
        const Tensor out = torch::stable::empty_like(grad_x);
        DenoiseArguments arguments = denoise_arguments(grad_x, x, s_t, out);
        arguments.eps = eps.data_ptr();
        arguments.grad_sum = grad_sum.data_ptr();
        Launch::loss_backward(arguments, grad_x.scalar_type(), grad_x);
        return out;
    }

    static Tensor cotangent(const Tensor& weight_c, const Tensor& level,
                            const std::optional<Tensor>& class_weight) {
        CotangentArguments arguments = cotangent_arguments(weight_c, level, class_weight);
        const Tensor out = torch::stable::new_empty(weight_c, {arguments.batch, arguments.num_features});
        arguments.out = out.data_ptr();
        Launch::cotangent(arguments, weight_c.scalar_type(), weight_c);
        return out;
    }

    static std::tuple<Tensor, Tensor> cotangent_backward(const Tensor& weight_c, const Tensor& level,
                                                         const std::optional<Tensor>& class_weight,
                                                         const Tensor& grad) {
        CotangentArguments arguments = cotangent_arguments(weight_c, level, class_weight);
        const ScalarType type = weight_c.scalar_type();
        const ScalarType compute = compute_type(type);
        const int64_t num_weights = class_weight.has_value() ? arguments.num_classes : 0;
        const Tensor grad_weight =
            torch::stable::new_empty(weight_c, {arguments.num_rows, arguments.num_features}, compute);
        const Tensor grad_class_weight =
            torch::stable::new_empty(weight_c, {arguments.batch, num_weights}, compute);
        arguments.grad = grad.data_ptr();
        arguments.grad_weight = grad_weight.data_ptr();
        arguments.grad_class_weight = num_weights > 0 ? grad_class_weight.data_ptr() : nullptr;
        Launch::cotangent_backward(arguments, type, weight_c);
        return {grad_weight, grad_class_weight};
    }
};

}  // namespace cdm

// Attaches a backend's kernels to the ops of torch.ops.cdm_fast.
#define CDM_IMPLEMENT_DENOISE(KEY, LAUNCH)                                                          \
    STABLE_TORCH_LIBRARY_IMPL(cdm_fast, KEY, m) {                                                   \
        m.impl("denoise_epilogue", TORCH_BOX(&cdm::DenoiseOps<LAUNCH>::epilogue));                  \
        m.impl("denoise_x0", TORCH_BOX(&cdm::DenoiseOps<LAUNCH>::x0));                              \
        m.impl("denoise_loss", TORCH_BOX(&cdm::DenoiseOps<LAUNCH>::loss));                          \
        m.impl("denoise_loss_backward", TORCH_BOX(&cdm::DenoiseOps<LAUNCH>::loss_backward));        \
        m.impl("head_cotangent", TORCH_BOX(&cdm::DenoiseOps<LAUNCH>::cotangent));                   \
        m.impl("head_cotangent_backward", TORCH_BOX(&cdm::DenoiseOps<LAUNCH>::cotangent_backward)); \
    }
