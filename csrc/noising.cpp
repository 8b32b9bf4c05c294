// `noising` on the CPU: torch.ops.cdm_fast.noising.
#include "contraction.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu_types.h"
#include "dispatch.h"
#include "noising_op.h"

#define CDM_BODY "noising_body.h"
#include "for_each_isa.h"

namespace {

using cdm::ScalarType;
using cdm::Tensor;

template <typename In, typename Out, typename Compute>
void run(const cdm::NoisingArguments& arguments) {
    if (arguments.channels > 1) {
        const int64_t tiles = isa_baseline::pixel_tiles(arguments) * (arguments.size / arguments.image_size);
        const int64_t grain = 1 + 16384 / (isa_baseline::kPixels * arguments.channels);
        torch::stable::parallel_for(0, tiles, grain, [&](int64_t first, int64_t last) {
            CDM_DISPATCH(noising_channels_last<In, Out, Compute>(arguments, first, last));
        });
        return;
    }
    constexpr int64_t chunk = isa_baseline::kChunk;
    torch::stable::parallel_for(0, (arguments.size + chunk - 1) / chunk, 16,
                                [&](int64_t first, int64_t last) {
                                    CDM_DISPATCH(noising_range<In, Out, Compute>(arguments, first, last));
                                });
}

template <typename In>
void run_from(const cdm::NoisingArguments& arguments, ScalarType out) {
    cdm::with_cpu_type("noising", out, [&](auto sample) {
        using Out = decltype(sample);
        if constexpr (std::is_same_v<In, double> == std::is_same_v<Out, double>)
            run<In, Out, cdm::Compute<Out>>(arguments);
        else
            STD_TORCH_CHECK(false, "noising: x_t is float64 if x0 is, and only then");
    });
}

void launch(const cdm::NoisingArguments& arguments, ScalarType in, ScalarType out) {
    if (in == ScalarType::Byte) return run_from<uint8_t>(arguments, out);
    cdm::with_cpu_type("noising", in, [&](auto sample) { run_from<decltype(sample)>(arguments, out); });
}

std::tuple<Tensor, Tensor, Tensor> noising(const Tensor& x0, const Tensor& level, const Tensor& a,
                                           const Tensor& s, const std::optional<Tensor>& seed,
                                           const std::optional<Tensor>& eps, int64_t num_grey_levels,
                                           bool flip, ScalarType dtype) {
    return cdm::noising_op(x0, level, a, s, seed, eps, num_grey_levels, flip, dtype, launch);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cdm_fast, CPU, m) { m.impl("noising", TORCH_BOX(&noising)); }
