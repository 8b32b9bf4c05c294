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

    // What `run` needs of the tensors for one vector, and what it makes of it; parts that a call does not ask
    // for are not touched.
    struct Inputs {
        Vec gate, value, g, of_gate, of_value, plus_gate, plus_value;
    };
    struct Results {
        Vec y, grad_g, grad_gate, grad_value;
    };

    CDM_INLINE Results computed(const Inputs& x, int64_t at) const {
        Results result;
        const Vec sigmoid_gate = sigmoid<T>(x.gate), silu = x.gate * sigmoid_gate;
        if (!a.g) {
            result.y = dropped(silu * x.value, at);
            return result;
        }
        const Vec first = sigmoid_gate + silu * (1 - sigmoid_gate);
        const Vec g = dropped(x.g, at);
        if (!a.v) {
            result.grad_gate = g * x.value * first;
            result.grad_value = g * silu;
            if (a.plus) {
                result.grad_gate += x.plus_gate;
                result.grad_value += x.plus_value;
            }
            return result;
        }
        const Vec second = sigmoid_gate * (1 - sigmoid_gate) * (2 + x.gate * (1 - 2 * sigmoid_gate));
        result.grad_g = dropped(x.of_gate * x.value * first + x.of_value * silu, at);
        result.grad_gate = g * (x.of_gate * x.value * second + x.of_value * first);
        result.grad_value = g * x.of_gate * first;
        return result;
    }

    // Call f(tensor, index of the first element, member) for what a call reads and for what it writes.
    template <class F>
    CDM_INLINE void for_inputs(int64_t at, F f) const {
        const int64_t narrow = token * a.hidden + at, wide = 2 * token * a.hidden + at;
        f(a.h, wide, &Inputs::gate);
        f(a.h, wide + a.hidden, &Inputs::value);
        if (a.g) f(a.g, narrow, &Inputs::g);
        if (a.v) {
            f(a.v, wide, &Inputs::of_gate);
            f(a.v, wide + a.hidden, &Inputs::of_value);
        }
        if (a.plus) {
            f(a.plus, wide, &Inputs::plus_gate);
            f(a.plus, wide + a.hidden, &Inputs::plus_value);
        }
    }
    template <class F>
    CDM_INLINE void for_results(int64_t at, F f) const {
        const int64_t narrow = token * a.hidden + at, wide = 2 * token * a.hidden + at;
        if (!a.g) return f(a.y, narrow, &Results::y);
        if (a.v) f(a.grad_g, narrow, &Results::grad_g);
        f(a.grad_h, wide, &Results::grad_gate);
        f(a.grad_h, wide + a.hidden, &Results::grad_value);
    }

    CDM_INLINE void run(int64_t at, int lanes) const {
        Inputs x;
        for_inputs(
            at, [&](const void* tensor, int64_t i, Vec Inputs::* part) { x.*part = read(tensor, i, lanes); });
        const Results result = computed(x, at);
        for_results(
            at, [&](void* tensor, int64_t i, Vec Results::* part) { write(tensor, i, result.*part, lanes); });
    }

    // Two vectors at once, for types whose pairs convert faster (vec_body.h); without dropout.
    CDM_INLINE void run_pair(int64_t at) const {
        Inputs x[2];
        for_inputs(at, [&](const void* tensor, int64_t i, Vec Inputs::* part) {
            load_pair(static_cast<const T*>(tensor) + i, x[0].*part, x[1].*part);
        });
        const Results first = computed(x[0], at), second = computed(x[1], at);
        for_results(at, [&](void* tensor, int64_t i, Vec Results::* part) {
            store_pair(static_cast<T*>(tensor) + i, first.*part, second.*part);
        });
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
            if (sizeof(T) == 2 && !mask)
                for (; at + 2 * lanes <= end; at += 2 * lanes) worker.run_pair(at);
            for (; at + lanes <= end; at += lanes) worker.run(at, lanes);
            if (at < end) worker.run(at, int(end - at));
        }
    }
}

}  // namespace CDM_ISA
