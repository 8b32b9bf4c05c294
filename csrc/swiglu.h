// One call of `swiglu` or one of its derivatives, for CPU and CUDA. cdm_fast/ops/swiglu.py is the
// specification.
#pragma once

#include <cstdint>

namespace cdm {

// Pointers to contiguous tensors, null where not requested. Without g it is the forward pass, with g the VJP,
// with v and g the derivative of the VJP.
struct Swiglu {
    const void* h;         // (tokens, 2 H): gate, then value
    void* y;               // (tokens, H)
    const void* g;         // (tokens, H)
    const void* v;         // (tokens, 2 H)
    const void* plus;      // (tokens, 2 H): added to the VJP, by the CPU kernels
    void* grad_h;          // (tokens, 2 H)
    void* grad_g;          // (tokens, H)
    const int64_t* seed;   // (3): seed, offset, number of the first image; null: no dropout
    int64_t tokens;        // of all images
    int64_t hidden;        // H
    int64_t image_tokens;  // of one image
    uint32_t drop_threshold;
    double keep_scale;  // 1 / (1 - dropout)
};

}  // namespace cdm
