// `noise_level_ce` on CPU: torch.ops.cdm_fast.noise_level_ce and its backward.
#include <cstdint>

#include "bf16.h"
#include "dispatch.h"
#include "noise_level_ce_op.h"

#define CDM_BODY "noise_level_ce_body.h"
#include "for_each_isa.h"

namespace {

using cdm::ScalarType;
using cdm::Tensor;

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

template <class T>
void level_logits_rows(const cdm::LevelLogitsArguments& arguments) {
    const int64_t grain = 1 + 8192 / arguments.num_logits;
    torch::stable::parallel_for(0, arguments.batch, grain, [&](int64_t first, int64_t last) {
        CDM_DISPATCH(level_logits<T>(arguments, first, last));
    });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& level,
                                           const std::optional<Tensor>& label, int64_t num_levels,
                                           int64_t num_classes) {
    const auto launch = [](const cdm::LevelCEArguments& arguments, ScalarType type) {
        switch (type) {
            case ScalarType::Double:
                return forward_rows<double>(arguments);
            case ScalarType::BFloat16:
                return forward_rows<cdm::bf16>(arguments);
            default:
                return forward_rows<float>(arguments);
        }
    };
    return cdm::level_ce_op(logits, level, label, num_levels, num_classes, launch);
}

Tensor backward(const Tensor& logits, const Tensor& level, const std::optional<Tensor>& label,
                int64_t num_levels, int64_t num_classes, const Tensor& sums,
                const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_log_ratio) {
    const auto launch = [](const cdm::LevelCEArguments& arguments, ScalarType type) {
        switch (type) {
            case ScalarType::Double:
                return backward_rows<double>(arguments);
            case ScalarType::BFloat16:
                return backward_rows<cdm::bf16>(arguments);
            default:
                return backward_rows<float>(arguments);
        }
    };
    return cdm::level_ce_backward_op(logits, level, label, num_levels, num_classes, sums, grad_loss,
                                     grad_log_ratio, launch);
}

Tensor level_logits(const Tensor& logits, int64_t num_levels, int64_t num_classes) {
    const auto launch = [](const cdm::LevelLogitsArguments& arguments, ScalarType type) {
        switch (type) {
            case ScalarType::Double:
                return level_logits_rows<double>(arguments);
            case ScalarType::BFloat16:
                return level_logits_rows<cdm::bf16>(arguments);
            default:
                return level_logits_rows<float>(arguments);
        }
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
