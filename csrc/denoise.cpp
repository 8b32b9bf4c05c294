// `denoise` on CPU: torch.ops.cdm_fast.{head_cotangent, denoise_epilogue, denoise_x0, denoise_loss} and backward.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "bf16.h"
#include "denoise.h"
#include "dispatch.h"

#define CDM_BODY "denoise_body.h"
#include "for_each_isa.h"

namespace {

using cdm::bf16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 16384;  // elements worth a thread

// Calls CALL<G, Compute>(arguments, begin, end) in parallel over [0, size), G being the type of `tensor`.
#define CDM_PARALLEL(TENSOR, SIZE, GRAIN, CALL)                                                 \
  torch::stable::parallel_for(0, SIZE, GRAIN, [&](int64_t begin, int64_t end) {                 \
    switch ((TENSOR).scalar_type()) {                                                           \
      case ScalarType::Double: CDM_DISPATCH(CALL<double, double>(arguments, begin, end)) break; \
      case ScalarType::BFloat16: CDM_DISPATCH(CALL<bf16, float>(arguments, begin, end)) break;  \
      default: CDM_DISPATCH(CALL<float, float>(arguments, begin, end))                          \
    }                                                                                           \
  })

cdm::DenoiseArguments common(const Tensor& grad_x, const Tensor& x, const Tensor& s_t, const Tensor& out) {
  cdm::DenoiseArguments arguments{};
  arguments.grad_x = grad_x.data_ptr();
  arguments.x = x.data_ptr();
  arguments.s_t = s_t.data_ptr();
  arguments.out = out.data_ptr();
  arguments.batch = grad_x.size(0);
  arguments.image_size = grad_x.numel() / grad_x.size(0);
  return arguments;
}

Tensor denoise_epilogue(const Tensor& grad_x, const Tensor& x, const Tensor& s_t) {
  const Tensor out = torch::stable::empty_like(x);
  const cdm::DenoiseArguments arguments = common(grad_x, x, s_t, out);
  CDM_PARALLEL(grad_x, grad_x.numel(), kGrain, denoise_epilogue);
  return out;
}

Tensor denoise_x0(const Tensor& grad_x, const Tensor& x, const Tensor& a_t, const Tensor& s_t) {
  const Tensor out = torch::stable::empty_like(x);
  cdm::DenoiseArguments arguments = common(grad_x, x, s_t, out);
  arguments.a_t = a_t.data_ptr();
  CDM_PARALLEL(grad_x, grad_x.numel(), kGrain, denoise_x0);
  return out;
}

Tensor denoise_loss(const Tensor& grad_x, const Tensor& x, const Tensor& s_t, const Tensor& eps) {
  const Tensor out = torch::stable::empty_like(s_t);
  cdm::DenoiseArguments arguments = common(grad_x, x, s_t, out);
  arguments.eps = eps.data_ptr();
  CDM_PARALLEL(grad_x, arguments.batch, 1 + kGrain / arguments.image_size, denoise_loss);
  return out;
}

Tensor denoise_loss_backward(const Tensor& grad_x, const Tensor& x, const Tensor& s_t, const Tensor& eps,
                             const Tensor& grad_sum) {
  const Tensor out = torch::stable::empty_like(grad_x);
  cdm::DenoiseArguments arguments = common(grad_x, x, s_t, out);
  arguments.eps = eps.data_ptr();
  arguments.grad_sum = grad_sum.data_ptr();
  CDM_PARALLEL(grad_x, grad_x.numel(), kGrain, denoise_loss_backward);
  return out;
}

cdm::CotangentArguments common(const Tensor& weight_c, const Tensor& level,
                               const std::optional<Tensor>& class_weight) {
  cdm::CotangentArguments arguments{};
  arguments.weight = weight_c.data_ptr();
  arguments.level = static_cast<const int64_t*>(level.data_ptr());
  arguments.class_weight = class_weight.has_value() ? class_weight->data_ptr() : nullptr;
  arguments.batch = level.size(0);
  arguments.num_rows = weight_c.size(0);
  arguments.num_features = weight_c.size(1);
  arguments.num_classes = class_weight.has_value() ? class_weight->size(1) : 1;
  return arguments;
}

Tensor head_cotangent(const Tensor& weight_c, const Tensor& level, const std::optional<Tensor>& class_weight) {
  cdm::CotangentArguments arguments = common(weight_c, level, class_weight);
  const Tensor out = torch::stable::new_empty(weight_c, {arguments.batch, arguments.num_features});
  arguments.out = out.data_ptr();
  const int64_t work = arguments.num_features * (1 + arguments.num_classes);
  CDM_PARALLEL(weight_c, arguments.batch, 1 + kGrain / work, cotangent);
  return out;
}

std::tuple<Tensor, Tensor> head_cotangent_backward(const Tensor& weight_c, const Tensor& level,
                                                   const std::optional<Tensor>& class_weight,
                                                   const Tensor& grad) {
  cdm::CotangentArguments arguments = common(weight_c, level, class_weight);
  const ScalarType compute =
      weight_c.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor grad_weight =
      torch::stable::new_empty(weight_c, {arguments.num_rows, arguments.num_features}, compute);
  const int64_t num_weights = class_weight.has_value() ? arguments.num_classes : 0;
  const Tensor grad_class_weight = torch::stable::new_empty(weight_c, {arguments.batch, num_weights}, compute);
  arguments.grad = grad.data_ptr();
  arguments.grad_weight = grad_weight.data_ptr();
  arguments.grad_class_weight = grad_class_weight.data_ptr();
  const int64_t blocks = (arguments.num_features + isa_baseline::kColumns - 1) / isa_baseline::kColumns;
  CDM_PARALLEL(weight_c, blocks, 1, cotangent_grad_weight);
  if (num_weights > 0) {
    const int64_t work = arguments.num_features * arguments.num_classes;
    CDM_PARALLEL(weight_c, arguments.batch, 1 + kGrain / work, cotangent_grad_class_weight);
  }
  return {grad_weight, grad_class_weight};
}

}  // namespace

// The schemas are in cdm_fast/ops/denoise.py.
STABLE_TORCH_LIBRARY_IMPL(cdm_fast, CPU, m) {
  m.impl("denoise_epilogue", TORCH_BOX(&denoise_epilogue));
  m.impl("denoise_x0", TORCH_BOX(&denoise_x0));
  m.impl("denoise_loss", TORCH_BOX(&denoise_loss));
  m.impl("denoise_loss_backward", TORCH_BOX(&denoise_loss_backward));
  m.impl("head_cotangent", TORCH_BOX(&head_cotangent));
  m.impl("head_cotangent_backward", TORCH_BOX(&head_cotangent_backward));
}
