// `noising` on CPU: torch.ops.cdm_fast.noising.
#include "contraction.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>

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

// What was not asked for comes back empty.
std::tuple<Tensor, Tensor, Tensor> noising(const Tensor& x0, const Tensor& level, const Tensor& a,
                                           const Tensor& s, const std::optional<Tensor>& seed,
                                           const std::optional<Tensor>& eps, int64_t num_grey_levels,
                                           bool flip, ScalarType dtype) {
  const ScalarType compute = a.scalar_type();
  const auto like_x0 = [&](ScalarType type, bool wanted) {
    return wanted ? torch::stable::new_empty(x0, x0.sizes(), type) : torch::stable::new_empty(x0, {0}, type);
  };
  const Tensor x_t = like_x0(dtype, true);
  const Tensor drawn = like_x0(compute, !eps.has_value());
  const Tensor clean = like_x0(compute, flip || num_grey_levels > 0);

  cdm::NoisingArguments arguments{};
  arguments.x0 = x0.data_ptr();
  arguments.level = static_cast<const int64_t*>(level.data_ptr());
  arguments.a = a.data_ptr();
  arguments.s = s.data_ptr();
  arguments.seed = static_cast<const int64_t*>(pointer(seed));
  arguments.eps_given = pointer(eps);
  arguments.x_t = x_t.data_ptr();
  arguments.eps_drawn = drawn.data_ptr();
  arguments.x0_out = clean.numel() > 0 ? clean.data_ptr() : nullptr;
  arguments.size = x0.numel();
  arguments.image_size = arguments.size / x0.size(0);
  arguments.row = x0.size(x0.dim() - 1);
  arguments.num_levels = a.size(0);
  arguments.scale = num_grey_levels > 0 ? static_cast<float>(2.0 / static_cast<double>(num_grey_levels)) : 0.0f;
  arguments.flip = flip;
  switch (x0.scalar_type()) {
    case ScalarType::Byte: run_float<uint8_t>(arguments, dtype); break;
    case ScalarType::BFloat16: run_float<cdm::bf16>(arguments, dtype); break;
    case ScalarType::Double: run<double, double, double>(arguments); break;
    default: run_float<float>(arguments, dtype);
  }
  return {x_t, drawn, clean};
}

}  // namespace

// The schema is in cdm_fast/ops/noising.py.
STABLE_TORCH_LIBRARY_IMPL(cdm_fast, CPU, m) { m.impl("noising", TORCH_BOX(&noising)); }
