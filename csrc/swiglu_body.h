// CPU kernels of `swiglu`, compiled once per instruction set (for_each_isa.h).

#include "vec_body.h"

namespace CDM_ISA {

using cdm::Swiglu;

constexpr int64_t kMaskLength = 1024;  // channels whose dropout mask is drawn at once
constexpr int64_t kMaskPadding = 80;   // words before the first one of a block, and a vector after the last

// Fills `mask` with 1 = kept for `count` elements from number `first`; returns where the first one is.
// Element i takes word i % 4 of block i / 4 of the DROPOUT stream (cdm_fast/ops/philox.py).
static const uint8_t* draw_gate_mask(const Swiglu& a, int64_t first, int64_t count, uint8_t* mask) {
    const cdm::PhiloxKey key = cdm::philox_key(a.seed[0], a.seed[1]);
    const uint32_t block = uint32_t(first / 4), threshold = a.drop_threshold;
    const int32_t blocks = int32_t((first % 4 + count + 3) / 4);
#pragma omp simd
    for (int32_t i = 0; i < blocks; ++i) {
        const cdm::Philox4 words = cdm::philox_block(key, cdm::kDropout, block + uint32_t(i));
        mask[4 * i] = words.x >= threshold;
        mask[4 * i + 1] = words.y >= threshold;
        mask[4 * i + 2] = words.z >= threshold;
        mask[4 * i + 3] = words.w >= threshold;
    }
    return mask + first % 4;
}

template <class T>
struct SwigluToken {
    using Scalar = typename Math<T>::Scalar;
    using Vec = typename Math<T>::Vec;

    const Swiglu& a;
    const int64_t token;
    const uint8_t* const mask;  // of channel `start`; null: nothing is dropped
    const int64_t start;

    CDM_INLINE Vec dropped(Vec value, int64_t at) const {
        return mask ? keep_where(mask + (at - start), value, Scalar(a.keep_scale)) : value;
    }
    static CDM_INLINE Vec read(const void* tensor, int64_t at, int lanes) {
        const T* p = static_cast<const T*>(tensor) + at;
        return lanes == lanes_of<T>() ? load(p) : load_some(p, lanes);
    }
    static CDM_INLINE void write(void* tensor, int64_t at, Vec value, int lanes) {
        T* p = static_cast<T*>(tensor) + at;
        if (lanes == lanes_of<T>())
            store(p, value);
        else
            store_some(p, value, lanes);
    }

    CDM_INLINE void run(int64_t at, int lanes) const {
        const int64_t narrow = token * a.hidden + at, wide = 2 * token * a.hidden + at;
        const Vec gate = read(a.h, wide, lanes), value = read(a.h, wide + a.hidden, lanes);
        const Vec sigmoid_gate = sigmoid<T>(gate), silu = gate * sigmoid_gate;
        if (!a.g) return write(a.y, narrow, dropped(silu * value, at), lanes);
        const Vec first = sigmoid_gate + silu * (1 - sigmoid_gate);
        const Vec g = dropped(read(a.g, narrow, lanes), at);
        if (!a.v) {
            write(a.grad_h, wide, g * value * first, lanes);
            write(a.grad_h, wide + a.hidden, g * silu, lanes);
            return;
        }
        const Vec second = sigmoid_gate * (1 - sigmoid_gate) * (2 + gate * (1 - 2 * sigmoid_gate));
        const Vec of_gate = read(a.v, wide, lanes), of_value = read(a.v, wide + a.hidden, lanes);
        write(a.grad_g, narrow, dropped(of_gate * value * first + of_value * silu, at), lanes);
        write(a.grad_h, wide, g * (of_gate * value * second + of_value * first), lanes);
        write(a.grad_h, wide + a.hidden, g * of_gate * first, lanes);
    }
};

// Tokens first .. last - 1.
template <class T>
static void swiglu_tokens(const Swiglu& a, int64_t first, int64_t last) {
    constexpr int lanes = lanes_of<T>();
    alignas(64) uint8_t drawn[kMaskLength + kMaskPadding] = {};
    for (int64_t token = first; token < last; ++token) {
        for (int64_t start = 0; start < a.hidden; start += kMaskLength) {
            const int64_t end = a.hidden - start < kMaskLength ? a.hidden : start + kMaskLength;
            const uint8_t* mask = nullptr;
            if (a.seed) {
                const int64_t before = a.seed[2] * a.image_tokens + token;
                mask = draw_gate_mask(a, before * a.hidden + start, end - start, drawn);
            }
            const SwigluToken<T> worker{a, token, mask, start};
            int64_t at = start;
            for (; at + lanes <= end; at += lanes) worker.run(at, lanes);
            if (at < end) worker.run(at, int(end - at));
        }
    }
}

}  // namespace CDM_ISA
