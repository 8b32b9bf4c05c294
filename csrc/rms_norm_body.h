// CPU kernels of `rms_norm`, compiled once per instruction set (for_each_isa.h).
//
// A token's channels are read twice, the second time from the first-level cache: for its sums and for the
// result. Sums over the tokens of an image, for the weight, are kept in the dtype of the statistics for
// kTokensAtOnce tokens, and in fp64 beyond.

#include "vec_body.h"

namespace CDM_ISA {

using cdm::RmsNorm;

constexpr int64_t kTokensAtOnce = 32;

// Calls f(first channel, lanes) for each vector of a token, the lanes of all but the last being whole.
template <class T, class F>
CDM_INLINE void for_each_vector(int64_t channels, F f) {
    constexpr int lanes = lanes_of<T>();
    int64_t at = 0;
    for (; at + lanes <= channels; at += lanes) f(at, lanes);
    if (at < channels) f(at, int(channels - at));
}

template <class T>
CDM_INLINE typename Math<T>::Vec read_lanes(const T* p, int lanes) {
    return lanes == lanes_of<T>() ? load(p) : load_some(p, lanes);
}

template <class T>
CDM_INLINE void write_lanes(T* p, typename Math<T>::Vec v, int lanes) {
    if (lanes == lanes_of<T>())
        store(p, v);
    else
        store_some(p, v, lanes);
}

template <class T>
struct RmsNormTokens {
    using Scalar = typename Math<T>::Scalar;
    using Vec = typename Math<T>::Vec;

    const RmsNorm& a;
    Scalar* const partial;  // (C), sums over the last tokens; null where no gradient of the weight is wanted

    const T* row(const void* tensor, int64_t token) const {
        return static_cast<const T*>(tensor) + token * a.channels;
    }
    T* row(void* tensor, int64_t token) const { return static_cast<T*>(tensor) + token * a.channels; }
    const Scalar* weight_of(int64_t token) const {
        return static_cast<const Scalar*>(a.weight) + token / a.tokens * a.parameter_stride;
    }
    Scalar& rstd_of(int64_t token) const { return static_cast<Scalar*>(a.rstd)[token]; }
    Scalar mean(Vec sum) const { return sum_lanes<T>(sum, lanes_of<T>()) / Scalar(a.channels); }

    CDM_INLINE void add_to_weight(int64_t at, Vec value, int lanes) const {
        if (partial) write_lanes(partial + at, read_lanes(partial + at, lanes) + value, lanes);
    }

    void forward(int64_t token) const {
        const T* x = row(a.x, token);
        T* y = row(a.y, token);
        const Scalar* weight = weight_of(token);
        Vec squares = {};
        for_each_vector<T>(a.channels, [&](int64_t at, int lanes) __attribute__((always_inline)) {
            const Vec value = read_lanes(x + at, lanes);
            squares += value * value;
        });
        const Scalar rstd = Scalar(1 / __builtin_sqrt(double(mean(squares)) + a.eps));
        rstd_of(token) = rstd;
        for_each_vector<T>(a.channels, [&](int64_t at, int lanes) __attribute__((always_inline)) {
            write_lanes(y + at, read_lanes(weight + at, lanes) * (read_lanes(x + at, lanes) * rstd), lanes);
        });
    }

    void vjp(int64_t token) const {
        const T *x = row(a.x, token), *g = row(a.g, token);
        T* grad_x = row(a.grad_x, token);
        const Scalar* weight = weight_of(token);
        const Scalar rstd = rstd_of(token);
        Vec sum = {};
        for_each_vector<T>(a.channels, [&](int64_t at, int lanes) __attribute__((always_inline)) {
            sum += read_lanes(g + at, lanes) * read_lanes(weight + at, lanes) *
                   (read_lanes(x + at, lanes) * rstd);
        });
        const Scalar mean_px = mean(sum);
        for_each_vector<T>(a.channels, [&](int64_t at, int lanes) __attribute__((always_inline)) {
            const Vec xhat = read_lanes(x + at, lanes) * rstd, upstream = read_lanes(g + at, lanes);
            const Vec p = upstream * read_lanes(weight + at, lanes);
            add_to_weight(at, upstream * xhat, lanes);
            write_lanes(grad_x + at, rstd * (p - xhat * mean_px), lanes);
        });
    }

    void vjp_backward(int64_t token) const {
        const T *x = row(a.x, token), *g = row(a.g, token), *v = row(a.v, token);
        T *grad_x = row(a.grad_x, token), *grad_g = row(a.grad_g, token);
        const Scalar* weight = weight_of(token);
        const Scalar rstd = rstd_of(token);
        Vec sum_px = {}, sum_vx = {}, sum_vp = {};
        for_each_vector<T>(a.channels, [&](int64_t at, int lanes) __attribute__((always_inline)) {
            const Vec xhat = read_lanes(x + at, lanes) * rstd, upstream = read_lanes(v + at, lanes);
            const Vec p = read_lanes(g + at, lanes) * read_lanes(weight + at, lanes);
            sum_px += p * xhat;
            sum_vx += upstream * xhat;
            sum_vp += upstream * p;
        });
        const Scalar mean_px = mean(sum_px), mean_vx = mean(sum_vx), mean_vp = mean(sum_vp);
        const Scalar slope = 3 * mean_vx * mean_px - mean_vp, square = rstd * rstd;
        for_each_vector<T>(a.channels, [&](int64_t at, int lanes) __attribute__((always_inline)) {
            const Vec xhat = read_lanes(x + at, lanes) * rstd, upstream = read_lanes(v + at, lanes);
            const Vec cotangent = read_lanes(g + at, lanes), factor = read_lanes(weight + at, lanes);
            const Vec q = rstd * (upstream - xhat * mean_vx);
            add_to_weight(at, q * cotangent, lanes);
            write_lanes(grad_g + at, q * factor, lanes);
            write_lanes(grad_x + at,
                        square * (xhat * slope - upstream * mean_px - cotangent * factor * mean_vx), lanes);
        });
    }

    void run(int64_t token) const {
        if (a.v) return vjp_backward(token);
        if (a.g) return vjp(token);
        forward(token);
    }
};

// Tokens first .. last - 1 of the batch, without a gradient of the weight.
template <class T>
static void rms_norm_tokens(const RmsNorm& a, int64_t first, int64_t last) {
    const RmsNormTokens<T> worker{a, nullptr};
    for (int64_t token = first; token < last; ++token) worker.run(token);
}

// All tokens of an image, with the gradient of the weight; sums (C) and partial (C) are scratch memory.
template <class T>
static void rms_norm_image(const RmsNorm& a, int64_t image, double* sums, typename Math<T>::Scalar* partial) {
    const RmsNormTokens<T> worker{a, partial};
    for (int64_t channel = 0; channel < a.channels; ++channel) sums[channel] = partial[channel] = 0;
    for (int64_t start = 0; start < a.tokens; start += kTokensAtOnce) {
        const int64_t end = a.tokens - start < kTokensAtOnce ? a.tokens : start + kTokensAtOnce;
        for (int64_t token = start; token < end; ++token) worker.run(image * a.tokens + token);
        for (int64_t channel = 0; channel < a.channels; ++channel) {
            sums[channel] += partial[channel];
            partial[channel] = 0;
        }
    }
    auto* result = static_cast<typename Math<T>::Scalar*>(a.grad_weight) + image * a.channels;
    for (int64_t channel = 0; channel < a.channels; ++channel)
        result[channel] = typename Math<T>::Scalar(sums[channel]);
}

}  // namespace CDM_ISA
