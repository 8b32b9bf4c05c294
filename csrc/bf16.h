// bfloat16 as the upper half of a float32, by bit tricks that every compiler vectorises.
#pragma once

#include <cstdint>
#include <cstring>

namespace cdm {

struct bf16 {
    uint16_t bits;
};

inline __attribute__((always_inline)) float widen(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
inline __attribute__((always_inline)) float widen(float value) { return value; }
inline __attribute__((always_inline)) double widen(double value) { return value; }
inline __attribute__((always_inline)) float widen(uint8_t value) { return static_cast<float>(value); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline __attribute__((always_inline)) void narrow(float value, bf16* out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    out->bits = static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}
inline __attribute__((always_inline)) void narrow(float value, float* out) { *out = value; }
inline __attribute__((always_inline)) void narrow(double value, double* out) { *out = value; }

}  // namespace cdm
