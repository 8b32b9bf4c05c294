// Entry points of `swiglu`, for CPU and CUDA: they allocate results and pass pointers to the kernels.
//
// A backend gives a struct `Launch` with a static function run(arguments, dtype of h, h). The schemas are in
// cdm_fast/ops/swiglu.py.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "swiglu.h"
#include "tensors.h"

namespace cdm {

template <class Launch>
struct SwigluOps {
    using OptionalTensor = std::optional<Tensor>;

    static Tensor forward(const Tensor& h, const OptionalTensor& seed, double dropout) {
        const Tensor y = torch::stable::new_empty(h, {h.size(0), h.size(1), h.size(2) / 2});
        Swiglu a = common(h, seed, dropout);
        a.y = y.data_ptr();
        Launch::run(a, h.scalar_type(), h);
        return y;
    }

    static Tensor vjp(const Tensor& g, const Tensor& h, const OptionalTensor& seed, double dropout) {
        return vjp_plus(g, h, std::nullopt, seed, dropout);
    }

    // The VJP plus a tensor. The CUDA kernel adds none, so the op has no CUDA implementation.
    static Tensor vjp_plus(const Tensor& g, const Tensor& h, const OptionalTensor& plus,
                           const OptionalTensor& seed, double dropout) {
        const Tensor grad_h = torch::stable::empty_like(h);
        Swiglu a = common(h, seed, dropout);
        check_dense({&g});
        if (plus) {
            check_dense({&*plus});
            a.plus = plus->data_ptr();
        }
        a.g = g.data_ptr();
        a.grad_h = grad_h.data_ptr();
        Launch::run(a, h.scalar_type(), h);
        return grad_h;
    }

    // Gradients of <v, VJP> with respect to g and h.
    static std::tuple<Tensor, Tensor> vjp_backward(const Tensor& v, const Tensor& g, const Tensor& h,
                                                   const OptionalTensor& seed, double dropout) {
        const Tensor grad_g = torch::stable::empty_like(g), grad_h = torch::stable::empty_like(h);
        Swiglu a = common(h, seed, dropout);
        check_dense({&v, &g});
        a.v = v.data_ptr();
        a.g = g.data_ptr();
        a.grad_g = grad_g.data_ptr();
        a.grad_h = grad_h.data_ptr();
        Launch::run(a, h.scalar_type(), h);
        return {grad_g, grad_h};
    }

  private:
    // The arguments that all entry points set.
    static Swiglu common(const Tensor& h, const OptionalTensor& seed, double dropout) {
        check_dense({&h});
        Swiglu a = {};
        a.h = h.data_ptr();
        if (dropout > 0) {
            STD_TORCH_CHECK(seed && seed->numel() == 3, "swiglu: dropout needs a seed of three numbers");
            a.seed = static_cast<const int64_t*>(seed->data_ptr());
        }
        a.tokens = h.size(0) * h.size(1);
        a.hidden = h.size(2) / 2;
        a.image_tokens = h.size(1);
        a.drop_threshold = static_cast<uint32_t>(dropout * 4294967296.0);
        a.keep_scale = 1 / (1 - dropout);
        return a;
    }

    // Kernels compute the addresses of elements: a tensor with gaps must not reach them.
    static void check_dense(std::initializer_list<const Tensor*> tensors) {
        for (const Tensor* tensor : tensors)
            STD_TORCH_CHECK(tensor->is_contiguous(), "swiglu: the kernels take contiguous tensors");
    }
};

}  // namespace cdm

#define CDM_IMPLEMENT_SWIGLU(DEVICE, LAUNCH)                                             \
    STABLE_TORCH_LIBRARY_IMPL(cdm_fast, DEVICE, m) {                                     \
        m.impl("swiglu", TORCH_BOX(&cdm::SwigluOps<LAUNCH>::forward));                   \
        m.impl("swiglu_vjp", TORCH_BOX(&cdm::SwigluOps<LAUNCH>::vjp));                   \
        m.impl("swiglu_vjp_backward", TORCH_BOX(&cdm::SwigluOps<LAUNCH>::vjp_backward)); \
    }
