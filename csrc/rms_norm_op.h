// Entry points of `rms_norm`, for CPU and CUDA: they allocate results and pass pointers to the kernels.
//
// A backend gives a struct `Launch` with two static functions: run(arguments, dtype of x, x), and
// sum_over_images(tensor (B, C)), which returns the sum (C). The schemas are in cdm_fast/ops/rms_norm.py.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <tuple>

#include "rms_norm.h"
#include "tensors.h"

namespace cdm {

template <class Launch>
struct RmsNormOps {
    static std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, double eps) {
        const Tensor y = torch::stable::empty_like(x);
        const Tensor rstd =
            torch::stable::new_empty(x, {x.size(0), x.size(1)}, compute_type(x.scalar_type()));
        RmsNorm a = common(x, weight, rstd);
        a.y = y.data_ptr();
        a.eps = eps;
        Launch::run(a, x.scalar_type(), x);
        return {y, rstd};
    }

    static Tensor vjp(const Tensor& g, const Tensor& x, const Tensor& weight, const Tensor& rstd) {
        const Tensor grad_x = torch::stable::empty_like(x);
        RmsNorm a = common(x, weight, rstd);
        check_dense({&g});
        a.g = g.data_ptr();
        a.grad_x = grad_x.data_ptr();
        Launch::run(a, x.scalar_type(), x);
        return grad_x;
    }

    // Gradients of <g, y> with respect to x and weight.
    static std::tuple<Tensor, Tensor> backward(const Tensor& g, const Tensor& x, const Tensor& weight,
                                               const Tensor& rstd) {
        const Tensor grad_x = torch::stable::empty_like(x), grad_weight = empty_per_image(x);
        RmsNorm a = common(x, weight, rstd);
        check_dense({&g});
        a.g = g.data_ptr();
        a.grad_x = grad_x.data_ptr();
        a.grad_weight = grad_weight.data_ptr();
        Launch::run(a, x.scalar_type(), x);
        return {grad_x, like_parameter(grad_weight, weight)};
    }

    // Gradients of <v, VJP> with respect to g, x and weight.
    static std::tuple<Tensor, Tensor, Tensor> vjp_backward(const Tensor& v, const Tensor& g, const Tensor& x,
                                                           const Tensor& weight, const Tensor& rstd) {
        const Tensor grad_g = torch::stable::empty_like(x), grad_x = torch::stable::empty_like(x);
        const Tensor grad_weight = empty_per_image(x);
        RmsNorm a = common(x, weight, rstd);
        check_dense({&v, &g});
        a.v = v.data_ptr();
        a.g = g.data_ptr();
        a.grad_g = grad_g.data_ptr();
        a.grad_x = grad_x.data_ptr();
        a.grad_weight = grad_weight.data_ptr();
        Launch::run(a, x.scalar_type(), x);
        return {grad_g, grad_x, like_parameter(grad_weight, weight)};
    }

  private:
    // The arguments that all entry points set.
    static RmsNorm common(const Tensor& x, const Tensor& weight, const Tensor& rstd) {
        check_dense({&x, &weight, &rstd});
        RmsNorm a = {};
        a.x = x.data_ptr();
        a.weight = weight.data_ptr();
        a.rstd = rstd.data_ptr();
        a.batch = x.size(0);
        a.tokens = x.size(1);
        a.channels = x.size(2);
        a.parameter_stride = weight.dim() == 2 ? a.channels : 0;
        return a;
    }

    // Kernels compute the addresses of elements: a tensor with gaps must not reach them.
    static void check_dense(std::initializer_list<const Tensor*> tensors) {
        for (const Tensor* tensor : tensors)
            STD_TORCH_CHECK(tensor->is_contiguous(), "rms_norm: the kernels take contiguous tensors");
    }

    static Tensor empty_per_image(const Tensor& x) {
        return torch::stable::new_empty(x, {x.size(0), x.size(2)}, compute_type(x.scalar_type()));
    }

    static Tensor like_parameter(const Tensor& per_image, const Tensor& parameter) {
        return parameter.dim() == 2 ? per_image : Launch::sum_over_images(per_image);
    }
};

}  // namespace cdm

#define CDM_IMPLEMENT_RMS_NORM(DEVICE, LAUNCH)                                              \
    STABLE_TORCH_LIBRARY_IMPL(cdm_fast, DEVICE, m) {                                        \
        m.impl("rms_norm", TORCH_BOX(&cdm::RmsNormOps<LAUNCH>::forward));                   \
        m.impl("rms_norm_vjp", TORCH_BOX(&cdm::RmsNormOps<LAUNCH>::vjp));                   \
        m.impl("rms_norm_backward", TORCH_BOX(&cdm::RmsNormOps<LAUNCH>::backward));         \
        m.impl("rms_norm_vjp_backward", TORCH_BOX(&cdm::RmsNormOps<LAUNCH>::vjp_backward)); \
    }
