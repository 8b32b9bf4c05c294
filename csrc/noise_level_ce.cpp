// `noise_level_ce` on CPU: torch.ops.cdm_fast.noise_level_ce and its backward.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "bf16.h"
#include "dispatch.h"
#include "noise_level_ce.h"

#define CDM_BODY "noise_level_ce_body.h"
#include "for_each_isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
void forward_rows(const cdm::LevelCEArguments& arguments) {
  const int64_t grain = 1 + 8192 / arguments.num_logits;
  torch::stable::parallel_for(0, arguments.batch, grain, [&](int64_t first, int64_t last) {
    CDM_DISPATCH(level_ce_forward<T>(arguments, first, last));
  });
}

template <class T>
void backward_rows(const cdm::LevelCEArguments& arguments) {
  const int64_t grain = 1 + 8192 / arguments.num_logits;
  torch::stable::parallel_for(0, arguments.batch, grain, [&](int64_t first, int64_t last) {
    CDM_DISPATCH(level_ce_backward<T>(arguments, first, last));
  });
}

void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->data_ptr() : nullptr;
}

cdm::LevelCEArguments common(const Tensor& logits, const Tensor& level, const std::optional<Tensor>& label,
                             int64_t num_levels, int64_t num_classes, const Tensor& sums) {
  cdm::LevelCEArguments arguments{};
  arguments.logits = logits.data_ptr();
  arguments.level = static_cast<const int64_t*>(level.data_ptr());
  arguments.label = static_cast<const int64_t*>(pointer(label));
  arguments.sums = sums.data_ptr();
  arguments.batch = logits.size(0);
  arguments.num_logits = logits.size(1);
  arguments.num_levels = num_levels;
  arguments.num_classes = num_classes;
  return arguments;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& level,
                                           const std::optional<Tensor>& label, int64_t num_levels,
                                           int64_t num_classes) {
  const int64_t batch = logits.size(0);
  const ScalarType type = logits.scalar_type();
  const ScalarType compute = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor loss = torch::stable::new_empty(logits, {batch}, compute);
  const Tensor log_ratio = torch::stable::new_empty(logits, {batch}, compute);
  const Tensor sums = torch::stable::new_empty(logits, {batch, 6}, compute);
  cdm::LevelCEArguments arguments = common(logits, level, label, num_levels, num_classes, sums);
  arguments.loss = loss.data_ptr();
  arguments.log_ratio = log_ratio.data_ptr();
  if (type == ScalarType::Double)
    forward_rows<double>(arguments);
  else if (type == ScalarType::BFloat16)
    forward_rows<cdm::bf16>(arguments);
  else
    forward_rows<float>(arguments);
  return {loss, log_ratio, sums};
}

Tensor backward(const Tensor& logits, const Tensor& level, const std::optional<Tensor>& label,
                int64_t num_levels, int64_t num_classes, const Tensor& sums, const Tensor& grad_loss,
                const Tensor& grad_log_ratio) {
  const ScalarType type = logits.scalar_type();
  const Tensor grad_logits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)}, type);
  cdm::LevelCEArguments arguments = common(logits, level, label, num_levels, num_classes, sums);
  arguments.grad_loss = grad_loss.data_ptr();
  arguments.grad_log_ratio = grad_log_ratio.data_ptr();
  arguments.grad_logits = grad_logits.data_ptr();
  if (type == ScalarType::Double)
    backward_rows<double>(arguments);
  else if (type == ScalarType::BFloat16)
    backward_rows<cdm::bf16>(arguments);
  else
    backward_rows<float>(arguments);
  return grad_logits;
}

}  // namespace

// The schemas are in cdm_fast/ops/noise_level_ce.py.
STABLE_TORCH_LIBRARY_IMPL(cdm_fast, CPU, m) {
  m.impl("noise_level_ce", TORCH_BOX(&forward));
  m.impl("noise_level_ce_backward", TORCH_BOX(&backward));
}
