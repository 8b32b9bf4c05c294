// Entry points of `group_norm_silu`, for CPU and CUDA: they allocate results and pass pointers to the
// kernels.
//
// A backend gives a struct `Launch` with two static functions: run(arguments, dtype of x, x), and
// sum_over_images(tensor (B, C)), which returns the sum (C). Image tensors are dense and of one layout, each
// in contiguous or in channels-last order; weight and bias are both (C) or both (B, C), contiguous, in the
// dtype of the statistics. A tensor named skip holds the channels that follow those of the one before it.
// The schemas are in cdm_fast/ops/group_norm_silu.py.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "group_norm_silu.h"
#include "tensors.h"

namespace cdm {

template <class Launch>
struct GroupNormSiluOps {
    using OptionalTensor = std::optional<Tensor>;

    static std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& skip,
                                                      const Tensor& weight, const Tensor& bias,
                                                      const OptionalTensor& seed, int64_t num_groups,
                                                      bool silu, double dropout, double eps) {
        const Tensor y = empty_whole(x, skip);
        const Tensor mean = empty_per_image(x, num_groups), rstd = empty_per_image(x, num_groups);
        GroupNormSilu a = common(x, skip, weight, bias, mean, rstd, seed, num_groups, silu, dropout);
        a.eps = eps;
        a.y = y.data_ptr();
        Launch::run(a, x.scalar_type(), x);
        return {y, mean, rstd};
    }

    static std::tuple<Tensor, Tensor> vjp(const Tensor& g, const Tensor& x, const OptionalTensor& skip,
                                          const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                          const Tensor& rstd, const OptionalTensor& seed, int64_t num_groups,
                                          bool silu, double dropout) {
        const auto grads = image_grads(x, skip);
        GroupNormSilu a = common(x, skip, weight, bias, mean, rstd, seed, num_groups, silu, dropout);
        run_vjp(a, g, x, grads);
        return grads;
    }

    // Gradients of <g, y> with respect to x, skip, weight and bias.
    static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& g, const Tensor& x,
                                                               const OptionalTensor& skip,
                                                               const Tensor& weight, const Tensor& bias,
                                                               const Tensor& mean, const Tensor& rstd,
                                                               const OptionalTensor& seed, int64_t num_groups,
                                                               bool silu, double dropout) {
        const auto grads = image_grads(x, skip);
        GroupNormSilu a = common(x, skip, weight, bias, mean, rstd, seed, num_groups, silu, dropout);
        const Tensor grad_weight = empty_per_image(x, a.channels), grad_bias = empty_per_image(x, a.channels);
        a.grad_weight = grad_weight.data_ptr();
        a.grad_bias = grad_bias.data_ptr();
        run_vjp(a, g, x, grads);
        return {std::get<0>(grads), std::get<1>(grads), like_parameter(grad_weight, weight),
                like_parameter(grad_bias, bias)};
    }

    // Gradients of <v, VJP> with respect to g, x, skip, weight and bias.
    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vjp_backward(
        const Tensor& v, const OptionalTensor& v_skip, const Tensor& g, const Tensor& x,
        const OptionalTensor& skip, const Tensor& weight, const Tensor& bias, const Tensor& mean,
        const Tensor& rstd, const OptionalTensor& seed, int64_t num_groups, bool silu, double dropout) {
        const Tensor grad_g = empty_whole(x, skip);
        const auto [grad_x, grad_skip] = image_grads(x, skip);
        GroupNormSilu a = common(x, skip, weight, bias, mean, rstd, seed, num_groups, silu, dropout);
        const Tensor grad_weight = empty_per_image(x, a.channels), grad_bias = empty_per_image(x, a.channels);
        check_layout({&v, &g}, a.channels_last);
        if (v_skip) check_layout({&*v_skip}, a.channels_last);
        a.g = g.data_ptr();
        a.v = pieces(v, v_skip);
        a.grad_g = grad_g.data_ptr();
        a.grad_x = {{grad_x.data_ptr(), skip ? grad_skip.data_ptr() : nullptr}};
        a.grad_weight = grad_weight.data_ptr();
        a.grad_bias = grad_bias.data_ptr();
        Launch::run(a, x.scalar_type(), x);
        return {grad_g, grad_x, grad_skip, like_parameter(grad_weight, weight),
                like_parameter(grad_bias, bias)};
    }

  private:
    static void run_vjp(GroupNormSilu& a, const Tensor& g, const Tensor& x,
                        const std::tuple<Tensor, Tensor>& grads) {
        check_layout({&g}, a.channels_last);
        a.g = g.data_ptr();
        a.grad_x = {{std::get<0>(grads).data_ptr(), a.x.at[1] ? std::get<1>(grads).data_ptr() : nullptr}};
        Launch::run(a, x.scalar_type(), x);
    }

    static Pieces pieces(const Tensor& first, const OptionalTensor& second) {
        return {{first.data_ptr(), second ? second->data_ptr() : nullptr}};
    }

    // The arguments that all entry points set.
    static GroupNormSilu common(const Tensor& x, const OptionalTensor& skip, const Tensor& weight,
                                const Tensor& bias, const Tensor& mean, const Tensor& rstd,
                                const OptionalTensor& seed, int64_t num_groups, bool silu, double dropout) {
        GroupNormSilu a = {};
        a.x = pieces(x, skip);
        a.weight = weight.data_ptr();
        a.bias = bias.data_ptr();
        a.mean = mean.data_ptr();
        a.rstd = rstd.data_ptr();
        if (dropout > 0) {
            STD_TORCH_CHECK(seed && seed->numel() == 3,
                            "group_norm_silu: dropout needs a seed of three numbers");
            a.seed = static_cast<const int64_t*>(seed->data_ptr());
        }
        a.batch = x.size(0);
        a.split = x.size(1);
        a.channels = a.split + (skip ? skip->size(1) : 0);
        a.pixels = x.numel() / (a.batch * a.split);
        a.groups = num_groups;
        a.parameter_stride = weight.dim() == 2 ? a.channels : 0;
        a.drop_threshold = static_cast<uint32_t>(dropout * 4294967296.0);
        a.keep_scale = 1 / (1 - dropout);
        a.channels_last = !x.is_contiguous();
        a.silu = silu;
        check_layout({&x}, a.channels_last);
        if (skip) check_layout({&*skip}, a.channels_last);
        return a;
    }

    // Kernels compute the addresses of elements: a tensor with gaps or of another layout must not reach them.
    static void check_layout(std::initializer_list<const Tensor*> images, bool channels_last) {
        for (const Tensor* image : images)
            STD_TORCH_CHECK(channels_last ? is_channels_last(*image) : image->is_contiguous(),
                            "group_norm_silu: the kernels take dense tensors, all in x's layout");
    }

    static bool is_channels_last(const Tensor& image) {
        int64_t expected = 1;
        const auto fits = [&](int64_t dim) {
            const bool right = image.size(dim) == 1 || image.stride(dim) == expected;
            expected *= image.size(dim);
            return right;
        };
        bool right = fits(1);
        for (int64_t dim = image.dim() - 1; dim > 1; --dim) right = fits(dim) && right;
        return fits(0) && right;
    }

    static Tensor empty_per_image(const Tensor& x, int64_t columns) {
        return torch::stable::new_empty(x, {x.size(0), columns}, compute_type(x.scalar_type()));
    }

    // An empty tensor of x's dtype and layout, with the channels of x and of skip.
    static Tensor empty_whole(const Tensor& x, const OptionalTensor& skip) {
        if (!skip) return torch::stable::empty_like(x);
        std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
        sizes[1] += skip->size(1);
        if (x.is_contiguous()) return torch::stable::new_empty(x, sizes);
        const int64_t last = x.dim() - 1;
        sizes.push_back(sizes[1]);
        sizes.erase(sizes.begin() + 1);
        Tensor whole = torch::stable::new_empty(x, sizes);
        for (int64_t dim = last; dim > 1; --dim) whole = torch::stable::transpose(whole, dim, dim - 1);
        return whole;
    }

    // For the gradients of x and of skip; where there is no skip, an undefined tensor, Python's None.
    static std::tuple<Tensor, Tensor> image_grads(const Tensor& x, const OptionalTensor& skip) {
        return {torch::stable::empty_like(x), skip ? torch::stable::empty_like(*skip) : Tensor()};
    }

    static Tensor like_parameter(const Tensor& per_image, const Tensor& parameter) {
        return parameter.dim() == 2 ? per_image : Launch::sum_over_images(per_image);
    }
};

}  // namespace cdm

#define CDM_IMPLEMENT_GROUP_NORM_SILU(DEVICE, LAUNCH)                                                    \
    STABLE_TORCH_LIBRARY_IMPL(cdm_fast, DEVICE, m) {                                                     \
        m.impl("group_norm_silu", TORCH_BOX(&cdm::GroupNormSiluOps<LAUNCH>::forward));                   \
        m.impl("group_norm_silu_vjp", TORCH_BOX(&cdm::GroupNormSiluOps<LAUNCH>::vjp));                   \
        m.impl("group_norm_silu_backward", TORCH_BOX(&cdm::GroupNormSiluOps<LAUNCH>::backward));         \
        m.impl("group_norm_silu_vjp_backward", TORCH_BOX(&cdm::GroupNormSiluOps<LAUNCH>::vjp_backward)); \
    }
