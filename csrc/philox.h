// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) and Box-Muller, for host and device.
//
// cdm_fast/ops/philox.py is the specification; it defines the counter and key of an element. The words are
// the same bits everywhere. The floating-point part must not be contracted to fused multiply-adds: device
// code uses the rounding intrinsics, and a host file that calls it includes contraction.h first.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CDM_HD __host__ __device__ __forceinline__
#define CDM_UNROLL _Pragma("unroll")
#else
#define CDM_HD inline __attribute__((always_inline))
#define CDM_UNROLL _Pragma("GCC unroll 16")
#endif

namespace cdm {

enum Stream : uint32_t { kNoise = 0, kDequantisation = 1, kFlip = 2, kDropout = 3 };

struct Philox4 {
    uint32_t x, y, z, w;
};

struct PhiloxKey {
    uint32_t seed_low, seed_high, offset_low, offset_high;
};

CDM_HD PhiloxKey philox_key(int64_t seed, int64_t offset) {
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32),
            static_cast<uint32_t>(offset), static_cast<uint32_t>(static_cast<uint64_t>(offset) >> 32)};
}

CDM_HD Philox4 philox4x32_10(Philox4 counter, uint32_t key_0, uint32_t key_1) {
    CDM_UNROLL
    for (int round = 0; round < 10; ++round) {
        const uint64_t product_0 = static_cast<uint64_t>(0xD2511F53u) * counter.x;
        const uint64_t product_1 = static_cast<uint64_t>(0xCD9E8D57u) * counter.z;
        counter = {
            static_cast<uint32_t>(product_1 >> 32) ^ counter.y ^ key_0, static_cast<uint32_t>(product_1),
            static_cast<uint32_t>(product_0 >> 32) ^ counter.w ^ key_1, static_cast<uint32_t>(product_0)};
        key_0 += 0x9E3779B9u;
        key_1 += 0xBB67AE85u;
    }
    return counter;
}

// Words 4 * block .. 4 * block + 3 of a stream.
CDM_HD Philox4 philox_block(const PhiloxKey& key, Stream stream, uint32_t block) {
    return philox4x32_10({block, stream, key.offset_low, key.offset_high}, key.seed_low, key.seed_high);
}

CDM_HD uint32_t philox_word(const Philox4& words, int index) {
    return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

// Whether image `index` of a batch is mirrored.
CDM_HD bool philox_flip(const PhiloxKey& key, int64_t index) {
    const Philox4 words = philox_block(key, kFlip, static_cast<uint32_t>(index / 4));
    return (philox_word(words, static_cast<int>(index % 4)) >> 31) != 0;
}

// One rounding per operation.
CDM_HD float strict_mul(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

CDM_HD float strict_add(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

CDM_HD float strict_sqrt(float a) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(a);
#else
    return __builtin_sqrtf(a);
#endif
}

CDM_HD int32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_int(value);
#else
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

CDM_HD float float_of(int32_t bits) {
#if defined(__CUDA_ARCH__)
    return __int_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

// Uniform in [0, 1) on a grid of 2^-24. Exact.
CDM_HD float uniform_of(uint32_t word) {
    return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f;
}

// Natural logarithm of a positive, normal number; the polynomial's source is in philox.py.
CDM_HD float strict_log(float u) {
    const int32_t bits = bits_of(u);
    const int32_t exponent = (bits - 0x3F3504F3) >> 23;
    const float f = strict_add(float_of(bits - exponent * 0x00800000), -1.0f);
    const float square = strict_mul(f, f);
    float p = -0.08101558685302734f;
    p = strict_add(strict_mul(p, f), 0.12712307274341583f);
    p = strict_add(strict_mul(p, f), -0.12972238659858704f);
    p = strict_add(strict_mul(p, f), 0.14202174544334412f);
    p = strict_add(strict_mul(p, f), -0.16642247140407562f);
    p = strict_add(strict_mul(p, f), 0.20001468062400818f);
    p = strict_add(strict_mul(p, f), -0.25000298023223877f);
    p = strict_add(strict_mul(p, f), 0.333333283662796f);
    const float tail = strict_mul(strict_mul(f, square), p);
    const float log_1p = strict_add(f, strict_add(tail, -strict_mul(0.5f, square)));
    return strict_add(strict_mul(static_cast<float>(exponent), 0.6931471824645996f), log_1p);
}

struct NormalPair {
    float x, y;
};

// Box-Muller: two independent standard normals out of two words.
CDM_HD NormalPair box_muller(uint32_t word_u, uint32_t word_v) {
    const float u = strict_add(strict_mul(static_cast<float>(word_u), 0x1p-32f), 0x1p-33f);
    const float radius = strict_sqrt(strict_mul(-2.0f, strict_log(u)));

    const uint32_t shifted = word_v + 0x20000000u;
    const uint32_t quarter = shifted >> 30;
    const int32_t rest = static_cast<int32_t>(shifted & 0x3FFFFFFFu) - 0x20000000;
    const float x = strict_mul(static_cast<float>(rest), 0x1p-30f);
    const float square = strict_mul(x, x);
    float sin = -0.004602163098752499f;
    sin = strict_add(strict_mul(sin, square), 0.07968021929264069f);
    sin = strict_add(strict_mul(sin, square), -0.6459634900093079f);
    sin = strict_add(strict_mul(sin, square), 1.5707963705062866f);
    sin = strict_mul(x, sin);
    float cos = 0.0009067417122423649f;
    cos = strict_add(strict_mul(cos, square), -0.02086152881383896f);
    cos = strict_add(strict_mul(cos, square), 0.253669410943985f);
    cos = strict_add(strict_mul(cos, square), -1.2337005138397217f);
    cos = strict_add(strict_mul(square, cos), 1.0f);

    const bool odd = (quarter & 1u) != 0;
    const int32_t cos_sign = static_cast<int32_t>(((quarter + 1u) & 2u) << 30);
    const int32_t sin_sign = static_cast<int32_t>((quarter & 2u) << 30);
    const float cos_v = float_of(bits_of(odd ? sin : cos) ^ cos_sign);
    const float sin_v = float_of(bits_of(odd ? cos : sin) ^ sin_sign);
    return {strict_mul(radius, cos_v), strict_mul(radius, sin_v)};
}

}  // namespace cdm
