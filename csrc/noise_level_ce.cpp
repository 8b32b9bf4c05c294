// `noise_level_ce` on the CPU: torch.ops.cdm_fast.noise_level_ce and its backward.
#include <cstdint>

#include "cpu_types.h"
#include "dispatch.h"
#include "noise_level_ce_op.h"

#define CDM_BODY "noise_level_ce_body.h"
#include "for_each_isa.h"

namespace {

using cdm::ScalarType;
using cdm::Tensor;

// Calls f(first row, last row) for the rows of the logits, in parallel.
template <class F>
void for_rows(int64_t batch, int64_t num_logits, const F& f) {
    torch::stable::parallel_for(0, batch, 1 + 8192 / num_logits, f);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& level,
                                           const std::optional<Tensor>& label, int64_t num_levels,
                                           int64_t num_classes) {
    const auto launch = [](const cdm::LevelCEArguments& arguments, ScalarType type) {
        cdm::with_cpu_type("noise_level_ce", type, [&](auto sample) {
            for_rows(arguments.batch, arguments.num_logits, [&](int64_t first, int64_t last) {
                CDM_DISPATCH(level_ce_forward<decltype(sample)>(arguments, first, last));
            });
        });
    };
    return cdm::level_ce_op(logits, level, label, num_levels, num_classes, launch);
}

Tensor backward(const Tensor& logits, const Tensor& level, const std::optional<Tensor>& label,
                int64_t num_levels, int64_t num_classes, const Tensor& sums,
                const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_log_ratio) {
    const auto launch = [](const cdm::LevelCEArguments& arguments, ScalarType type) {
        cdm::with_cpu_type("noise_level_ce_backward", type, [&](auto sample) {
            for_rows(arguments.batch, arguments.num_logits, [&](int64_t first, int64_t last) {
                CDM_DISPATCH(level_ce_backward<decltype(sample)>(arguments, first, last));
            });
        });
    };
    return cdm::level_ce_backward_op(logits, level, label, num_levels, num_classes, sums, grad_loss,
                                     grad_log_ratio, launch);
}

Tensor level_logits(const Tensor& logits, int64_t num_levels, int64_t num_classes) {
    const auto launch = [](const cdm::LevelLogitsArguments& arguments, ScalarType type) {
        cdm::with_cpu_type("level_logits", type, [&](auto sample) {
            for_rows(arguments.batch, arguments.num_logits, [&](int64_t first, int64_t last) {
                CDM_DISPATCH(level_logits<decltype(sample)>(arguments, first, last));
            });
        });
    };
    return cdm::level_logits_op(logits, num_levels, num_classes, launch);
}

}  // namespace

// The schemas are in cdm_fast/ops/noise_level_ce.py.
STABLE_TORCH_LIBRARY_IMPL(cdm_fast, CPU, m) {
    m.impl("noise_level_ce", TORCH_BOX(&forward));
    m.impl("noise_level_ce_backward", TORCH_BOX(&backward));
    m.impl("level_logits", TORCH_BOX(&level_logits));
}
