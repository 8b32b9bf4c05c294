// CPU loops of `denoise`, compiled once per instruction set (for_each_isa.h).
#include "vec_body.h"

namespace CDM_ISA {

using namespace cdm;

// Calls per_image(image, first, last) for each image in which elements [begin, end) of the batch lie.
template <class PerImage>
CDM_INLINE void for_each_image(int64_t begin, int64_t end, int64_t image_size, PerImage per_image) {
    while (begin < end) {
        const int64_t image = begin / image_size;
        const int64_t next = (image + 1) * image_size;
        const int64_t stop = next < end ? next : end;
        per_image(image, begin, stop);
        begin = stop;
    }
}

template <class G, class C>
static void denoise_epilogue(const DenoiseArguments& p, int64_t begin, int64_t end) {
    const G* g = static_cast<const G*>(p.grad_x);
    const C* x = static_cast<const C*>(p.x);
    C* out = static_cast<C*>(p.out);
    for_each_image(begin, end, p.image_size, [&](int64_t image, int64_t first, int64_t last) {
        const C s = static_cast<const C*>(p.s_t)[image];
#pragma omp simd
        for (int64_t i = first; i < last; ++i) out[i] = eps_hat(C(widen(g[i])), x[i], s);
    });
}

template <class G, class C>
static void denoise_x0(const DenoiseArguments& p, int64_t begin, int64_t end) {
    const G* g = static_cast<const G*>(p.grad_x);
    const C* x = static_cast<const C*>(p.x);
    C* out = static_cast<C*>(p.out);
    for_each_image(begin, end, p.image_size, [&](int64_t image, int64_t first, int64_t last) {
        const C a = static_cast<const C*>(p.a_t)[image], s = static_cast<const C*>(p.s_t)[image];
#pragma omp simd
        for (int64_t i = first; i < last; ++i) out[i] = x0_hat(C(widen(g[i])), x[i], a, s);
    });
}

// Images [begin, end). Stretches of an image are summed in C, and the sums of the stretches in double, in an
// order that does not depend on the number of threads.
template <class G, class C>
static void denoise_loss(const DenoiseArguments& p, int64_t begin, int64_t end) {
    constexpr int64_t stretch = 1024;
    for (int64_t image = begin; image < end; ++image) {
        const G* g = static_cast<const G*>(p.grad_x) + image * p.image_size;
        const C* x = static_cast<const C*>(p.x) + image * p.image_size;
        const C* eps = static_cast<const C*>(p.eps) + image * p.image_size;
        const C s = static_cast<const C*>(p.s_t)[image];
        double total = 0;
        for (int64_t first = 0; first < p.image_size; first += stretch) {
            const int64_t last = first + stretch < p.image_size ? first + stretch : p.image_size;
            C sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = first; i < last; ++i) {
                const C error = eps_hat(C(widen(g[i])), x[i], s) - eps[i];
                sum += error * error;
            }
            total += double(sum);
        }
        static_cast<C*>(p.out)[image] = C(total);
    }
}

// d(squared error)/d(grad_x) = 2 s (eps_hat - eps).
template <class G, class C>
static void denoise_loss_backward(const DenoiseArguments& p, int64_t begin, int64_t end) {
    const G* g = static_cast<const G*>(p.grad_x);
    const C* x = static_cast<const C*>(p.x);
    const C* eps = static_cast<const C*>(p.eps);
    G* out = static_cast<G*>(p.out);
    for_each_image(begin, end, p.image_size, [&](int64_t image, int64_t first, int64_t last) {
        const C s = static_cast<const C*>(p.s_t)[image];
        const C factor = 2 * s * static_cast<const C*>(p.grad_sum)[image];
#pragma omp simd
        for (int64_t i = first; i < last; ++i)
            narrow(factor * (eps_hat(C(widen(g[i])), x[i], s) - eps[i]), out + i);
    });
}

constexpr int64_t kColumns = 64;  // features computed together: their sums fit registers or the L1 cache

// Examples [begin, end).
template <class T, class C>
static void cotangent(const CotangentArguments& p, int64_t begin, int64_t end) {
    const T* weight = static_cast<const T*>(p.weight);
    for (int64_t b = begin; b < end; ++b) {
        T* out = static_cast<T*>(p.out) + b * p.num_features;
        const int64_t row = first_row(p, p.level[b]);
        const bool is_noise = row == p.num_rows - 1;
        const C start = is_known(p, p.level[b]) ? C(0) : C(__builtin_nan(""));
        for (int64_t first = 0; first < p.num_features; first += kColumns) {
            const int64_t width = p.num_features - first < kColumns ? p.num_features - first : kColumns;
            C sum[kColumns];
            for (int64_t d = 0; d < width; ++d) sum[d] = start;
            if (!is_noise && start == 0) {
                const T* noise = weight + (p.num_rows - 1) * p.num_features + first;
#pragma omp simd
                for (int64_t d = 0; d < width; ++d) sum[d] = C(widen(noise[d]));
                for (int64_t c = 0; c < p.num_classes; ++c) {
                    const T* of_class = weight + (row + c) * p.num_features + first;
                    const C share = class_share<C>(p, b, c);
#pragma omp simd
                    for (int64_t d = 0; d < width; ++d) sum[d] -= share * C(widen(of_class[d]));
                }
            }
#pragma omp simd
            for (int64_t d = 0; d < width; ++d) narrow(sum[d], out + first + d);
        }
    }
}

// Columns [begin, end) of the weight's gradient, in units of kColumns. Examples are added in their order.
template <class T, class C>
static void cotangent_grad_weight(const CotangentArguments& p, int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns;
    const int64_t last = end * kColumns < p.num_features ? end * kColumns : p.num_features;
    C* out = static_cast<C*>(p.grad_weight);
    for (int64_t row = 0; row < p.num_rows; ++row)
        __builtin_memset(out + row * p.num_features + first, 0, sizeof(C) * (last - first));
    C* noise = out + (p.num_rows - 1) * p.num_features;
    for (int64_t b = 0; b < p.batch; ++b) {
        const T* g = static_cast<const T*>(p.grad) + b * p.num_features;
        const int64_t row = first_row(p, p.level[b]);
        if (row == p.num_rows - 1) continue;
        const C known = is_known(p, p.level[b]) ? C(1) : C(__builtin_nan(""));
#pragma omp simd
        for (int64_t d = first; d < last; ++d) noise[d] += known * C(widen(g[d]));
        for (int64_t c = 0; known == 1 && c < p.num_classes; ++c) {
            C* of_class = out + (row + c) * p.num_features;
            const C share = class_share<C>(p, b, c);
#pragma omp simd
            for (int64_t d = first; d < last; ++d) of_class[d] -= share * C(widen(g[d]));
        }
    }
}

// Examples [begin, end).
template <class T, class C>
static void cotangent_grad_class_weight(const CotangentArguments& p, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
        const T* g = static_cast<const T*>(p.grad) + b * p.num_features;
        const int64_t row = first_row(p, p.level[b]);
        for (int64_t c = 0; c < p.num_classes; ++c) {
            C sum = is_known(p, p.level[b]) ? C(0) : C(__builtin_nan(""));
            if (row != p.num_rows - 1 && sum == 0) {
                const T* of_class = static_cast<const T*>(p.weight) + (row + c) * p.num_features;
#pragma omp simd reduction(+ : sum)
                for (int64_t d = 0; d < p.num_features; ++d) sum -= C(widen(g[d])) * C(widen(of_class[d]));
            }
            static_cast<C*>(p.grad_class_weight)[b * p.num_classes + c] = sum;
        }
    }
}

}  // namespace CDM_ISA
