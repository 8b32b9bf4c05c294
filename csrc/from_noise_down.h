// One call of `from_noise_down` on the CPU. cdm_fast/ops/from_noise_down.py is the specification.
#pragma once

#include <cstdint>

namespace cdm {

constexpr int64_t kColumns = 512;  // whose sums are kept at once

// Pointers to contiguous tensors (levels * rows_per_level + 1, width).
struct FromNoiseDown {
    const void* rows;
    void* out;
    int64_t levels, rows_per_level, common, width;
    bool transposed;
};

}  // namespace cdm
