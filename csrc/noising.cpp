// `noising` on CPU: torch.ops.cdm_fast_cpp.noising.
#include "contraction.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>

#include "bf16.h"
#include "dispatch.h"
#include "noising.h"

#define CDM_BODY "noising_body.h"
#include "for_each_isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename In, typename Out, typename Compute>
void run(const cdm::NoisingArguments& arguments) {
  constexpr int64_t chunk = isa_baseline::kChunk;
  torch::stable::parallel_for(
      0, (arguments.size + chunk - 1) / chunk, 16, [&](int64_t first, int64_t last) {
        CDM_DISPATCH(noising_range<In, Out, Compute>(arguments, first, last));
      });
}

template <typename In>
void run_float(const cdm::NoisingArguments& arguments, ScalarType out) {
  if (out == ScalarType::BFloat16)
    run<In, cdm::bf16, float>(arguments);
  else
    run<In, float, float>(arguments);
}

void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->data_ptr() : nullptr;
}

void noising(const Tensor& x0, const Tensor& level, const Tensor& a, const Tensor& s,
             const std::optional<Tensor>& seed, const std::optional<Tensor>& eps_given,
             int64_t num_grey_levels, bool flip, const Tensor& x_t, const std::optional<Tensor>& eps_drawn,
             const std::optional<Tensor>& x0_out) {
  cdm::NoisingArguments arguments{};
  arguments.x0 = x0.data_ptr();
  arguments.level = static_cast<const int64_t*>(level.data_ptr());
  arguments.a = a.data_ptr();
  arguments.s = s.data_ptr();
  arguments.seed = static_cast<const int64_t*>(pointer(seed));
  arguments.eps_given = pointer(eps_given);
  arguments.x_t = x_t.data_ptr();
  arguments.eps_drawn = pointer(eps_drawn);
  arguments.x0_out = pointer(x0_out);
  arguments.size = x0.numel();
  arguments.image_size = arguments.size / x0.size(0);
  arguments.row = x0.size(x0.dim() - 1);
  arguments.num_levels = a.size(0);
  arguments.scale = num_grey_levels > 0 ? static_cast<float>(2.0 / static_cast<double>(num_grey_levels)) : 0.0f;
  arguments.flip = flip;
  switch (x0.scalar_type()) {
    case ScalarType::Byte: return run_float<uint8_t>(arguments, x_t.scalar_type());
    case ScalarType::BFloat16: return run_float<cdm::bf16>(arguments, x_t.scalar_type());
    case ScalarType::Double: return run<double, double, double>(arguments);
    default: return run_float<float>(arguments, x_t.scalar_type());
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cdm_fast_cpp, m) {
  m.def(
      "noising(Tensor x0, Tensor level, Tensor a, Tensor s, Tensor? seed, Tensor? eps_given, "
      "int num_grey_levels, bool flip, Tensor(a!) x_t, Tensor(b!)? eps_drawn, Tensor(c!)? x0_out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cdm_fast_cpp, CPU, m) { m.impl("noising", TORCH_BOX(&noising)); }
