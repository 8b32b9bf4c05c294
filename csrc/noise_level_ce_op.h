// Entry points of `noise_level_ce`, for CPU and CUDA: they allocate results and pass pointers to the kernels.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "noise_level_ce.h"
#include "tensors.h"

namespace cdm {

inline LevelCEArguments level_ce_arguments(const Tensor& logits, const Tensor& level,
                                           const std::optional<Tensor>& label, int64_t num_levels,
                                           int64_t num_classes, const Tensor& sums) {
    LevelCEArguments arguments{};
    arguments.logits = logits.data_ptr();
    arguments.level = static_cast<const int64_t*>(level.data_ptr());
    arguments.label = label.has_value() ? static_cast<const int64_t*>(label->data_ptr()) : nullptr;
    arguments.sums = sums.data_ptr();
    arguments.batch = logits.size(0);
    arguments.num_logits = logits.size(1);
    arguments.num_levels = num_levels;
    arguments.num_classes = num_classes;
    return arguments;
}

// loss, log_ratio and sums, filled by launch(arguments, dtype of the logits).
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> level_ce_op(const Tensor& logits, const Tensor& level,
                                               const std::optional<Tensor>& label, int64_t num_levels,
                                               int64_t num_classes, const Launch& launch) {
    const int64_t batch = logits.size(0);
    const ScalarType type = logits.scalar_type();
    const ScalarType compute = compute_type(type);
    const Tensor loss = torch::stable::new_empty(logits, {batch}, compute);
    const Tensor log_ratio = torch::stable::new_empty(logits, {batch}, compute);
    const Tensor sums = torch::stable::new_empty(logits, {batch, 6}, compute);
    LevelCEArguments arguments = level_ce_arguments(logits, level, label, num_levels, num_classes, sums);
    arguments.loss = loss.data_ptr();
    arguments.log_ratio = log_ratio.data_ptr();
    launch(arguments, type);
    return {loss, log_ratio, sums};
}

// The gradient with respect to the logits, filled by launch(arguments, dtype of the logits).
template <typename Launch>
Tensor level_ce_backward_op(const Tensor& logits, const Tensor& level, const std::optional<Tensor>& label,
                            int64_t num_levels, int64_t num_classes, const Tensor& sums,
                            const std::optional<Tensor>& grad_loss,
                            const std::optional<Tensor>& grad_log_ratio, const Launch& launch) {
    const Tensor grad_logits = torch::stable::empty_like(logits);
    LevelCEArguments arguments = level_ce_arguments(logits, level, label, num_levels, num_classes, sums);
    arguments.grad_loss = grad_loss.has_value() ? grad_loss->data_ptr() : nullptr;
    arguments.grad_log_ratio = grad_log_ratio.has_value() ? grad_log_ratio->data_ptr() : nullptr;
    arguments.grad_logits = grad_logits.data_ptr();
    launch(arguments, logits.scalar_type());
    return grad_logits;
}

// The logits of the levels, filled by launch(arguments, dtype of the logits).
template <typename Launch>
Tensor level_logits_op(const Tensor& logits, int64_t num_levels, int64_t num_classes, const Launch& launch) {
    const ScalarType type = logits.scalar_type();
    const ScalarType compute = compute_type(type);
    const Tensor result = torch::stable::new_empty(logits, {logits.size(0), num_levels}, compute);
    launch(LevelLogitsArguments{logits.data_ptr(), result.data_ptr(), logits.size(0), logits.size(1),
                                num_levels, num_classes},
           type);
    return result;
}

}  // namespace cdm
