// From tensors to pointers, for the CPU and the CUDA version of `group_norm_silu`.
//
// A backend gives a struct `Launch` with `static void run(const GroupNormSilu&, ScalarType, const Tensor&
// x)`. All outputs are given by the caller. Image tensors are dense and of one layout; weight and bias are
// both (C) or both (B, C), contiguous, in the dtype of the statistics. A tensor named skip holds the channels
// that follow those of the one before it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "group_norm_silu.h"

namespace cdm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Launch>
struct GroupNormSiluOps {
    static void forward(Tensor x, std::optional<Tensor> skip, Tensor weight, Tensor bias,
                        std::optional<Tensor> seed, Tensor y, Tensor mean, Tensor rstd, int64_t num_groups,
                        double eps, bool silu, double dropout, bool channels_last) {
        GroupNormSilu a =
            common(x, skip, weight, bias, mean, rstd, seed, num_groups, silu, dropout, channels_last);
        a.eps = eps;
        a.y = y.data_ptr();
        Launch::run(a, x.scalar_type(), x);
    }

    static void vjp(Tensor g, Tensor x, std::optional<Tensor> skip, Tensor weight, Tensor bias, Tensor mean,
                    Tensor rstd, std::optional<Tensor> seed, Tensor grad_x, std::optional<Tensor> grad_skip,
                    Tensor grad_weight, Tensor grad_bias, int64_t num_groups, bool silu, double dropout,
                    bool channels_last) {
        GroupNormSilu a =
            common(x, skip, weight, bias, mean, rstd, seed, num_groups, silu, dropout, channels_last);
        a.g = g.data_ptr();
        a.grad_x = pieces(grad_x, grad_skip);
        a.grad_weight = grad_weight.data_ptr();
        a.grad_bias = grad_bias.data_ptr();
        Launch::run(a, x.scalar_type(), x);
    }

    static void vjp_backward(Tensor v, std::optional<Tensor> v_skip, Tensor g, Tensor x,
                             std::optional<Tensor> skip, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,
                             std::optional<Tensor> seed, Tensor grad_g, Tensor grad_x,
                             std::optional<Tensor> grad_skip, Tensor grad_weight, Tensor grad_bias,
                             int64_t num_groups, bool silu, double dropout, bool channels_last) {
        GroupNormSilu a =
            common(x, skip, weight, bias, mean, rstd, seed, num_groups, silu, dropout, channels_last);
        a.g = g.data_ptr();
        a.v = pieces(v, v_skip);
        a.grad_x = pieces(grad_x, grad_skip);
        a.grad_g = grad_g.data_ptr();
        a.grad_weight = grad_weight.data_ptr();
        a.grad_bias = grad_bias.data_ptr();
        Launch::run(a, x.scalar_type(), x);
    }

  private:
    static Pieces pieces(const Tensor& first, const std::optional<Tensor>& second) {
        return {{first.data_ptr(), second ? second->data_ptr() : nullptr}};
    }

    // What the three entry points have in common.
    static GroupNormSilu common(const Tensor& x, const std::optional<Tensor>& skip, const Tensor& weight,
                                const Tensor& bias, const Tensor& mean, const Tensor& rstd,
                                const std::optional<Tensor>& seed, int64_t num_groups, bool silu,
                                double dropout, bool channels_last) {
        GroupNormSilu a = {};
        a.x = pieces(x, skip);
        a.weight = weight.data_ptr();
        a.bias = bias.data_ptr();
        a.mean = mean.data_ptr();
        a.rstd = rstd.data_ptr();
        a.seed = dropout > 0 ? static_cast<const int64_t*>(seed->data_ptr()) : nullptr;
        a.batch = x.size(0);
        a.split = x.size(1);
        a.channels = a.split + (skip ? skip->size(1) : 0);
        a.pixels = x.numel() / (a.batch * a.split);
        a.groups = num_groups;
        a.parameter_stride = weight.dim() == 2 ? a.channels : 0;
        a.drop_threshold = static_cast<uint32_t>(dropout * 4294967296.0);
        a.keep_scale = 1 / (1 - dropout);
        a.channels_last = channels_last;
        a.silu = silu;
        return a;
    }
};

}  // namespace cdm

#define CDM_IMPLEMENT_GROUP_NORM_SILU(DEVICE, LAUNCH)                                                    \
    STABLE_TORCH_LIBRARY_IMPL(cdm_fast_cpp, DEVICE, m) {                                                 \
        m.impl("group_norm_silu_forward", TORCH_BOX(&cdm::GroupNormSiluOps<LAUNCH>::forward));           \
        m.impl("group_norm_silu_vjp", TORCH_BOX(&cdm::GroupNormSiluOps<LAUNCH>::vjp));                   \
        m.impl("group_norm_silu_vjp_backward", TORCH_BOX(&cdm::GroupNormSiluOps<LAUNCH>::vjp_backward)); \
    }
