// `denoise` on the CPU: torch.ops.cdm_fast.{head_cotangent, denoise_epilogue, denoise_x0, denoise_loss} and
// their backward.
#include <cstdint>

#include "cpu_types.h"
#include "denoise_op.h"
#include "dispatch.h"

#define CDM_BODY "denoise_body.h"
#include "for_each_isa.h"

namespace {

using cdm::ScalarType;
using cdm::Tensor;

constexpr int64_t kGrain = 16384;  // elements for which another thread pays

// Calls CALL<type, type of the arithmetic>(arguments, begin, end) in parallel over [0, size).
#define CDM_PARALLEL(TYPE, SIZE, GRAIN, CALL)                                         \
    cdm::with_cpu_type("denoise", TYPE, [&](auto sample) {                            \
        using T = decltype(sample);                                                   \
        torch::stable::parallel_for(0, SIZE, GRAIN, [&](int64_t begin, int64_t end) { \
            CDM_DISPATCH(CALL<T, cdm::Compute<T>>(arguments, begin, end));            \
        });                                                                           \
    })

struct Launch {
    static void epilogue(const cdm::DenoiseArguments& arguments, ScalarType type, const Tensor&) {
        CDM_PARALLEL(type, arguments.batch * arguments.image_size, kGrain, denoise_epilogue);
    }

    static void x0(const cdm::DenoiseArguments& arguments, ScalarType type, const Tensor&) {
        CDM_PARALLEL(type, arguments.batch * arguments.image_size, kGrain, denoise_x0);
    }

    static void loss(const cdm::DenoiseArguments& arguments, ScalarType type, const Tensor&) {
        CDM_PARALLEL(type, arguments.batch, 1 + kGrain / arguments.image_size, denoise_loss);
    }

    static void loss_backward(const cdm::DenoiseArguments& arguments, ScalarType type, const Tensor&) {
        CDM_PARALLEL(type, arguments.batch * arguments.image_size, kGrain, denoise_loss_backward);
    }

    static void cotangent(const cdm::CotangentArguments& arguments, ScalarType type, const Tensor&) {
        const int64_t work = arguments.num_features * (1 + arguments.num_classes);
        CDM_PARALLEL(type, arguments.batch, 1 + kGrain / work, cotangent);
    }

    static void cotangent_backward(const cdm::CotangentArguments& arguments, ScalarType type, const Tensor&) {
        const int64_t blocks = (arguments.num_features + isa_baseline::kColumns - 1) / isa_baseline::kColumns;
        CDM_PARALLEL(type, blocks, 1, cotangent_grad_weight);
        if (arguments.grad_class_weight == nullptr) return;
        const int64_t work = arguments.num_features * arguments.num_classes;
        CDM_PARALLEL(type, arguments.batch, 1 + kGrain / work, cotangent_grad_class_weight);
    }
};

}  // namespace

CDM_IMPLEMENT_DENOISE(CPU, Launch)
