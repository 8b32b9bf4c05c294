// `group_norm_silu` on the CPU: registration, and how a call is cut into work for the threads.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>

#include "cpu_types.h"
#include "dispatch.h"
#include "group_norm_silu.h"
#include "group_norm_silu_op.h"
#include "philox.h"
#include "sum_rows.h"

#define CDM_BODY "group_norm_silu_body.h"
#include "for_each_isa.h"

namespace {

using cdm::GroupNormSilu;
using cdm::GroupRange;
using cdm::ScalarType;
using cdm::Tensor;

constexpr int64_t kCacheBytes = 512 * 1024;  // what the tensors of one range may occupy
constexpr int64_t kLineBytes = 64;
constexpr int64_t kMinElementsPerThread = 16 * 1024;

// Number of groups in a range: whole cache lines when channels-last, no more than fit the cache, and enough
// ranges to keep the threads busy.
int64_t groups_per_range(const GroupNormSilu& a, int64_t element_size, int64_t kept_size) {
    const int64_t channels_per_group = a.channels / a.groups;
    const int64_t line = kLineBytes / element_size;
    const int64_t smallest =
        a.channels_last ? std::min(a.groups, std::lcm(channels_per_group, line) / channels_per_group) : 1;
    const int64_t tensors = a.v.at[0] ? 5 : a.g ? 3 : 2;
    const int64_t element_bytes = tensors * element_size + (a.g ? kept_size : 0);
    const int64_t fit = kCacheBytes / (channels_per_group * a.pixels * element_bytes);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t fair = a.groups * a.batch / threads;
    const int64_t wanted = std::min({fit, fair, a.groups});
    return std::max(smallest, wanted / smallest * smallest);
}

// Scratch memory that a thread keeps between calls: fresh pages would cost as much as the work on them.
char* thread_scratch(int64_t bytes) {
    thread_local std::unique_ptr<double[]> memory;
    thread_local int64_t size = 0;
    if (size < bytes) {
        memory.reset(new double[bytes / sizeof(double) + 1]);
        size = bytes;
    }
    return reinterpret_cast<char*>(memory.get());
}

template <class T>
void run_ranges(const GroupNormSilu& a) {
    const int64_t channels_per_group = a.channels / a.groups;
    constexpr int64_t kept_size = sizeof(typename isa_baseline::Math<T>::Scalar);
    const int64_t range_groups = groups_per_range(a, sizeof(T), kept_size);
    const int64_t ranges = (a.groups + range_groups - 1) / range_groups;
    const int64_t channels = range_groups * channels_per_group;
    const int64_t elements = channels * a.pixels;
    const int64_t scratch_bytes =
        (channels + cdm::kRowPadding) * int64_t(sizeof(double)) * (isa_baseline::kNumSums + cdm::kNumRows) +
        (a.g ? elements * kept_size : 0) + (a.seed ? elements + cdm::kRowPadding : 0);
    const int64_t grain = std::max<int64_t>(1, kMinElementsPerThread / elements);
    torch::stable::parallel_for(0, a.batch * ranges, grain, [&](int64_t begin, int64_t end) {
        char* scratch = thread_scratch(scratch_bytes);
        for (int64_t index = begin; index < end; ++index) {
            const int64_t first = index % ranges * channels;
            const GroupRange range{index / ranges, first, std::min(first + channels, a.channels)};
            CDM_DISPATCH(group_norm_silu_item<T>(a, range, scratch));
        }
    });
}

struct Launch {
    static void run(const GroupNormSilu& a, ScalarType dtype, const Tensor&) {
        cdm::with_cpu_type("group_norm_silu", dtype, [&](auto sample) { run_ranges<decltype(sample)>(a); });
    }

    static Tensor sum_over_images(const Tensor& per_image) { return cdm::sum_rows(per_image); }
};

}  // namespace

CDM_IMPLEMENT_GROUP_NORM_SILU(CPU, Launch)
