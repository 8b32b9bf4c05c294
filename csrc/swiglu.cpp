// `swiglu` on the CPU: registration, and how a call is cut into work for the threads.
#include <algorithm>
#include <cstdint>

#include "cpu_types.h"
#include "dispatch.h"
#include "philox.h"
#include "swiglu.h"
#include "swiglu_op.h"

#define CDM_BODY "swiglu_body.h"
#include "for_each_isa.h"

namespace {

using cdm::ScalarType;
using cdm::Swiglu;
using cdm::Tensor;

constexpr int64_t kMinElementsPerThread = 8 * 1024;

struct Launch {
    static void run(const Swiglu& a, ScalarType dtype, const Tensor&) {
        const int64_t grain = std::max<int64_t>(1, kMinElementsPerThread / std::max<int64_t>(a.hidden, 1));
        cdm::with_cpu_type("swiglu", dtype, [&](auto sample) {
            torch::stable::parallel_for(0, a.tokens, grain, [&](int64_t first, int64_t last) {
                CDM_DISPATCH(swiglu_tokens<decltype(sample)>(a, first, last));
            });
        });
    }
};

}  // namespace

CDM_IMPLEMENT_SWIGLU(CPU, Launch)

STABLE_TORCH_LIBRARY_IMPL(cdm_fast, CPU, m) {
    m.impl("swiglu_vjp_plus", TORCH_BOX(&cdm::SwigluOps<Launch>::vjp_plus));
}
