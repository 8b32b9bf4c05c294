// `rms_norm` on the CPU: registration, and how a call is cut into work for the threads.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu_types.h"
#include "dispatch.h"
#include "rms_norm.h"
#include "rms_norm_op.h"
#include "sum_rows.h"

#define CDM_BODY "rms_norm_body.h"
#include "for_each_isa.h"

namespace {

using cdm::RmsNorm;
using cdm::ScalarType;
using cdm::Tensor;

constexpr int64_t kMinElementsPerThread = 16 * 1024;

template <class T>
void run_all(const RmsNorm& a) {
    if (!a.grad_weight) {
        const int64_t grain = std::max<int64_t>(1, kMinElementsPerThread / a.channels);
        torch::stable::parallel_for(0, a.batch * a.tokens, grain, [&](int64_t first, int64_t last) {
            CDM_DISPATCH(rms_norm_tokens<T>(a, first, last));
        });
        return;
    }
    const int64_t grain = std::max<int64_t>(1, kMinElementsPerThread / (a.channels * a.tokens));
    torch::stable::parallel_for(0, a.batch, grain, [&](int64_t first, int64_t last) {
        std::vector<double> sums(a.channels);
        std::vector<cdm::Compute<T>> partial(a.channels);
        for (int64_t image = first; image < last; ++image)
            CDM_DISPATCH(rms_norm_image<T>(a, image, sums.data(), partial.data()));
    });
}

struct Launch {
    static void run(const RmsNorm& a, ScalarType dtype, const Tensor&) {
        cdm::with_cpu_type("rms_norm", dtype, [&](auto sample) { run_all<decltype(sample)>(a); });
    }

    static Tensor sum_over_images(const Tensor& per_image) { return cdm::sum_rows(per_image); }
};

}  // namespace

CDM_IMPLEMENT_RMS_NORM(CPU, Launch)
