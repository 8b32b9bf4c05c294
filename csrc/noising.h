// The arithmetic of one element of `noising`, for host and device. cdm_fast/ops/noising.py is the
// specification.
#pragma once

#include "philox.h"

namespace cdm {

// A pixel of N grey levels in [-1, 1): 2 (u + U) / N - 1. scale = 2 / N.
CDM_HD float dequantised(float pixel, float uniform, float scale) {
    return strict_add(strict_mul(strict_add(pixel, uniform), scale), -1.0f);
}

CDM_HD float noised(float a_t, float x0, float s_t, float eps) {
    return strict_add(strict_mul(a_t, x0), strict_mul(s_t, eps));
}
CDM_HD double noised(double a_t, double x0, double s_t, double eps) { return a_t * x0 + s_t * eps; }

// One call: pointers, null where not requested. "Compute" is float, or double for double images.
// All images lie in memory alike: contiguous, or with their channels last (then channels > 1).
struct NoisingArguments {
    const void* x0;         // (B, ...) unsigned char, float, bfloat16 or double
    const int64_t* level;   // (B,)
    const void* a;          // (L,) Compute
    const void* s;          // (L,) Compute
    const int64_t* seed;    // (2,)
    const void* eps_given;  // (B, ...) Compute; null: drawn
    void* x_t;              // (B, ...)
    void* eps_drawn;        // (B, ...) Compute
    void* x0_out;           // (B, ...) Compute
    int64_t size;           // elements in all
    int64_t image_size;     // elements of an image
    int64_t row;            // elements of its last axis
    int64_t channels;       // of images with channels last; else 1
    int64_t num_levels;
    float scale;  // 2 / grey levels; 0 for images that are not dequantised
    bool flip;
};

// Offset in memory of element `index` of the batch, counted in contiguous order.
CDM_HD int64_t memory_offset(const NoisingArguments& p, int64_t index) {
    if (p.channels == 1) return index;
    const int64_t plane = p.image_size / p.channels, within = index % p.image_size;
    return index - within + within % plane * p.channels + within / plane;
}

}  // namespace cdm
