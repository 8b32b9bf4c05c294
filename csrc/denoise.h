// The arithmetic of `denoise`, for host and device. cdm_fast/ops/denoise.py is the specification.
#pragma once

#include <cstdint>

#include "philox.h"

namespace cdm {

// CDM Thm 3.1: E[eps | x_t = x] = s_t (grad_x F + x).
template <typename Compute>
CDM_HD Compute eps_hat(Compute grad_x, Compute x, Compute s_t) {
    return s_t * (grad_x + x);
}

template <typename Compute>
CDM_HD Compute x0_hat(Compute grad_x, Compute x, Compute a_t, Compute s_t) {
    return (x - s_t * eps_hat(grad_x, x, s_t)) / a_t;
}

// Images: pointers to contiguous (B, ...) tensors, null where unused. "G" is the type of grad_x,
// "Compute" float, or double for doubles.
struct DenoiseArguments {
    const void* grad_x;    // (B, ...) G
    const void* x;         // (B, ...) Compute
    const void* eps;       // (B, ...) Compute
    const void* a_t;       // (B,) Compute
    const void* s_t;       // (B,) Compute
    const void* grad_sum;  // (B,) Compute: cotangent of the squared error
    void* out;  // eps_hat or x0_hat (B, ...) Compute; squared error (B,) Compute; its gradient (B, ...) G
    int64_t batch;
    int64_t image_size;
};

// The head's cotangent: pointers to contiguous tensors.
struct CotangentArguments {
    const void* weight;        // (N, D) T
    const int64_t* level;      // (B,)
    const void* class_weight;  // (B, K) Compute, or null: K = 1, weight 1
    const void* grad;          // (B, D) T
    void* out;                 // (B, D) T
    void* grad_weight;         // (N, D) Compute
    void* grad_class_weight;   // (B, K) Compute, or null
    int64_t batch, num_rows, num_features, num_classes;
};

// First row of the weight for the classes of a level; pure noise has row N-1.
CDM_HD int64_t first_row(const CotangentArguments& p, int64_t level) { return level * p.num_classes; }

CDM_HD bool is_known(const CotangentArguments& p, int64_t level) {
    return level >= 0 && first_row(p, level) < p.num_rows;
}

// Weight of class c in the cotangent of example b.
template <typename Compute>
CDM_HD Compute class_share(const CotangentArguments& p, int64_t b, int64_t c) {
    return p.class_weight == nullptr ? Compute(1)
                                     : static_cast<const Compute*>(p.class_weight)[b * p.num_classes + c];
}

}  // namespace cdm
