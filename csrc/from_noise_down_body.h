// CPU kernel of `from_noise_down`, compiled once per instruction set (for_each_isa.h).

#include "vec_body.h"

namespace CDM_ISA {

using cdm::FromNoiseDown;

// Columns first .. last - 1 of the levels' rows, at most cdm::kColumns of them: sums from one end, negated,
// plus the row of noise in the first `common` columns unless transposed.
template <class T>
static void from_noise_down_columns(const FromNoiseDown& a, int64_t first, int64_t last) {
    double sums[cdm::kColumns] = {};
    cdm::Compute<T> start[cdm::kColumns] = {};
    const T* from = static_cast<const T*>(a.rows);
    T* to = static_cast<T*>(a.out);
    const int64_t count = last - first, columns = a.rows_per_level * a.width;
    const int64_t from_noise = a.transposed ? 0 : a.common * a.width;
    for (int64_t i = 0; i < count && first + i < from_noise; ++i)
        start[i] = cdm::widen(from[a.levels * columns + (first + i) % a.width]);
    for (int64_t step = 0; step < a.levels; ++step) {
        const int64_t at = (a.transposed ? step : a.levels - 1 - step) * columns + first;
        const T* row = from + at;
        T* out = to + at;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) sums[i] += double(cdm::widen(row[i]));
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) cdm::narrow(start[i] - cdm::Compute<T>(sums[i]), out + i);
    }
}

}  // namespace CDM_ISA
