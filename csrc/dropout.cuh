// Dropout of the elements that a thread of a CUDA kernel holds.
#pragma once

#include <cstdint>

#include "cuda_common.cuh"
#include "philox.h"

namespace cdm {

// Drops or scales each value; value i is decided by word `first + i * step` of the dropout stream.
// Arguments: of an op, with its seed (not null), drop_threshold and keep_scale.
template <int count, class Arguments>
__device__ __forceinline__ void drop_words(const Arguments& a, int64_t first, int64_t step,
                                           Pack<float, count>& values) {
    const PhiloxKey key = philox_key(a.seed[0], a.seed[1]);
    int64_t drawn_block = -1;
    Philox4 words = {};
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const int64_t index = first + i * step;
        if (index / 4 != drawn_block) {
            drawn_block = index / 4;
            words = philox_block(key, kDropout, static_cast<uint32_t>(drawn_block));
        }
        const bool kept = philox_word(words, static_cast<int>(index % 4)) >= a.drop_threshold;
        values.at[i] *= kept ? static_cast<float>(a.keep_scale) : 0.0f;
    }
}

}  // namespace cdm
