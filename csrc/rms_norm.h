// One call of `rms_norm` or one of its derivatives, for CPU and CUDA. cdm_fast/ops/rms_norm.py is the
// specification.
#pragma once

#include <cstdint>

namespace cdm {

// Pointers to contiguous tensors, null where not requested. "Compute" is float, or double for double tokens.
// Without g it is the forward pass, with g the VJP, with v and g the derivative of the VJP.
struct RmsNorm {
    const void* x;                    // (B, N, C)
    const void* weight;               // (C) or (B, C) Compute
    void* rstd;                       // (B, N) Compute: written by the forward pass, else read
    void* y;                          // (B, N, C)
    const void* g;                    // (B, N, C)
    const void* v;                    // (B, N, C)
    void* grad_x;                     // (B, N, C)
    void* grad_g;                     // (B, N, C)
    void* grad_weight;                // (B, C) Compute: of each image
    int64_t batch, tokens, channels;  // B, N, C
    int64_t parameter_stride;         // from one image's weight to the next: 0 or C
    double eps;
};

}  // namespace cdm
