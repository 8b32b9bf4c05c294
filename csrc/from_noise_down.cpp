// `from_noise_down` on the CPU: the cumulated rows of a head, and the transposed map.
#include "from_noise_down.h"

#include <algorithm>
#include <cstdint>

#include "cpu_types.h"
#include "dispatch.h"

#define CDM_BODY "from_noise_down_body.h"
#include "for_each_isa.h"

namespace {

using cdm::FromNoiseDown;
using cdm::kColumns;
using cdm::Tensor;

constexpr int64_t kMinElementsPerThread = 16 * 1024;

// The row of noise: itself, or its gradient, to which all levels contribute.
template <class T>
void last_row(const FromNoiseDown& a) {
    const int64_t columns = a.rows_per_level * a.width;
    const T* from = static_cast<const T*>(a.rows) + a.levels * columns;
    T* to = static_cast<T*>(a.out) + a.levels * columns;
    for (int64_t i = 0; i < a.width; ++i) {
        double sum = cdm::widen(from[i]);
        if (a.transposed)
            for (int64_t j = 0; j < a.common; ++j) sum -= cdm::widen(to[i + j * a.width - columns]);
        cdm::narrow(cdm::Compute<T>(sum), to + i);
    }
}

Tensor from_noise_down(const Tensor& rows, int64_t rows_per_level, int64_t common, bool transposed) {
    STD_TORCH_CHECK(rows.is_contiguous(), "from_noise_down: the kernel takes contiguous tensors");
    const Tensor out = torch::stable::empty_like(rows);
    FromNoiseDown a = {};
    a.rows = rows.data_ptr();
    a.out = out.data_ptr();
    a.levels = (rows.size(0) - 1) / rows_per_level;
    a.rows_per_level = rows_per_level;
    a.common = common;
    a.width = rows.numel() / rows.size(0);
    a.transposed = transposed;
    const int64_t columns = rows_per_level * a.width, pieces = (columns + kColumns - 1) / kColumns;
    cdm::with_cpu_type("from_noise_down", rows.scalar_type(), [&](auto sample) {
        using T = decltype(sample);
        const int64_t grain = 1 + kMinElementsPerThread / (a.levels * kColumns);
        torch::stable::parallel_for(0, pieces, grain, [&](int64_t first, int64_t last) {
            for (int64_t piece = first; piece < last; ++piece) {
                const int64_t end = std::min(columns, (piece + 1) * kColumns);
                CDM_DISPATCH(from_noise_down_columns<T>(a, piece * kColumns, end));
            }
        });
        last_row<T>(a);
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cdm_fast, CPU, m) { m.impl("from_noise_down", TORCH_BOX(&from_noise_down)); }
