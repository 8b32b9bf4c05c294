// CPU loops of `noise_level_ce`, compiled once per instruction set (for_each_isa.h).
#include "vec_body.h"

namespace CDM_ISA {

using namespace cdm;

// The largest lane. It is arbitrary if a lane is NaN: the sum of exponentials is NaN for any maximum then.
template <class Vec>
CDM_INLINE auto largest_of(Vec v) {
    auto most = v[0];
    for (int lane = 1; lane < int(sizeof(v) / sizeof(most)); ++lane) most = v[lane] > most ? v[lane] : most;
    return most;
}

// Terms of a softmax below e^-69, 1e-30, are 0 in fp32: a gradient full of subnormal numbers makes the
// products that read it forty times as slow on some processors.
constexpr float kLowestExponent = -69.0f;

// e^x for the terms of a softmax, x <= 0: relative error below 2^-22 (1 + |x|) down to kLowestExponent, 0
// below it, exactly 1 at 0; NaN stays NaN. e^x = 2^n 2^r with t = x log2(e) = n + r, |r| <= 1/2, and 2^r = 1
// + r Q(r), fitted to 9e-9.
CDM_INLINE VecF exp2_rest(VecF r) {
    VecF q = r * 0.00015461447765119374f + 0.0013390866806730628f;
    q = q * r + 0.009618056938052177f;
    q = q * r + 0.055503569543361664f;
    q = q * r + 0.24022650718688965f;
    q = q * r + 0.6931471824645996f;
    return q * r + 1.0f;
}

#if CDM_VECTOR_BYTES == 64

CDM_INLINE float largest_lane(VecF v) { return _mm512_reduce_max_ps(v); }

CDM_INLINE VecF exp_falling(VecF x) {
    const __m512 t = x * 1.44269504f;
    const __m512 r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kLowestExponent), _CMP_NLT_UQ);  // or NaN
    return _mm512_maskz_scalef_ps(kept, exp2_rest(r), t - r);
}

#else

CDM_INLINE float largest_lane(VecF v) { return largest_of(v); }

CDM_INLINE VecF exp_falling(VecF x) {
    VecF t = x * 1.44269504f;
    t = t < -126.0f ? broadcast<VecF>(-126.0f) : t;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const VecF shifted = t + magic, n = shifted - magic;
    const VecF power = bit_cast<VecF>(bit_cast<VecI>(exp2_rest(t - n)) + (bit_cast<VecI>(shifted) << 23));
    return x < kLowestExponent ? VecF{} : power;
}

#endif

CDM_INLINE double largest_lane(VecD v) { return largest_of(v); }
CDM_INLINE VecD exp_falling(VecD x) { return exp(x); }

// For the last vector of a range whose size is not a multiple of the lanes, which overlaps the vector before.
// Keeps the last `fresh` lanes and sets the others, which are counted already, to 0.
template <class Vec>
CDM_INLINE Vec keep_last(Vec value, int fresh) {
    constexpr int lanes = int(sizeof(Vec) / sizeof(value[0]));
    Vec kept{};
    for (int lane = 0; lane < lanes; ++lane) kept[lane] = lane >= lanes - fresh ? value[lane] : 0;
    return kept;
}

template <class T>
static typename Math<T>::Scalar maximum_of(const T* z, int64_t size) {
    using Vec = typename Math<T>::Vec;
    using Scalar = typename Math<T>::Scalar;
    constexpr int lanes = lanes_of<T>();
    if (size < lanes) {
        Scalar best = widen(z[0]);
        for (int64_t i = 1; i < size; ++i) best = widen(z[i]) > best ? widen(z[i]) : best;
        return best;
    }
    Vec most = load(z + size - lanes);
    for (int64_t i = 0; i + lanes <= size; i += lanes) {
        const Vec v = load(z + i);
        most = v > most ? v : most;
    }
    return largest_lane(most);
}

template <class T>
static LogSum<typename Math<T>::Scalar> log_sum_of(const T* row, LogitRange range) {
    using Vec = typename Math<T>::Vec;
    using Scalar = typename Math<T>::Scalar;
    constexpr int lanes = lanes_of<T>();
    const T* z = row + range.begin;
    const int64_t size = range.end - range.begin;
    if (size == 1) return {widen(z[0]), Scalar(0)};
    const Scalar maximum = maximum_of(z, size);
    if (maximum == -Scalar(__builtin_inf())) return {Scalar(0), maximum};  // every logit is -inf
    Vec sum{};
    int64_t i = 0;
    for (; i + lanes <= size; i += lanes) sum += exp_falling(load(z + i) - maximum);
    const int rest = int(size - i);
    if (rest > 0 && size >= lanes) sum += keep_last(exp_falling(load(z + size - lanes) - maximum), rest);
    Scalar total = sum_lanes<T>(sum, lanes);
    if (size < lanes) total = sum_lanes<T>(exp_falling(load_some(z, rest) - maximum), rest);
    return {maximum, Scalar(__builtin_log(double(total)))};
}

template <class T>
static void level_ce_forward(const LevelCEArguments& p, int64_t first, int64_t last) {
    using Scalar = typename Math<T>::Scalar;
    for (int64_t b = first; b < last; ++b) {
        const T* z = static_cast<const T*>(p.logits) + b * p.num_logits;
        Scalar* sums = static_cast<Scalar*>(p.sums) + 6 * b;
        const LogitRange range = true_logits(p, b);
        const Scalar nan = Scalar(__builtin_nan(""));
        LogSum<Scalar> all = log_sum_of(z, LogitRange{0, p.num_logits});
        LogSum<Scalar> truth = {nan, nan};
        if (range.end > range.begin)
            truth = log_sum_of(z, range);
        else
            all = truth;
        const LogSum<Scalar> noise = log_sum_of(z, noise_logits(p));
        static_cast<Scalar*>(p.loss)[b] = log_quotient(all, truth);
        static_cast<Scalar*>(p.log_ratio)[b] = log_quotient(truth, noise);
        const Scalar row[6] = {all.maximum,   all.log_sum,   truth.maximum,
                               truth.log_sum, noise.maximum, noise.log_sum};
        for (int i = 0; i < 6; ++i) sums[i] = row[i];
    }
}

// The weight and the log-sum-exp of weight * softmax over a range.
template <class Scalar>
struct Term {
    Scalar weight;
    LogSum<Scalar> sum;
};

template <class Vec, class Scalar>
CDM_INLINE Vec sum_of_terms(Vec z, const Term<Scalar>* terms, int num_terms) {
    Vec sum{};
    for (int k = 0; k < num_terms; ++k)
        sum += terms[k].weight * exp_falling((z - terms[k].sum.maximum) - terms[k].sum.log_sum);
    return sum;
}

// grad[j] = sum over terms of weight exp(z[j] - logsumexp), for j in a range.
template <class T, int num_terms>
static void store_terms(const T* row, T* row_grad, LogitRange range,
                        const Term<typename Math<T>::Scalar>* terms) {
    constexpr int lanes = lanes_of<T>();
    const T* z = row + range.begin;
    T* grad = row_grad + range.begin;
    const int64_t size = range.end - range.begin;
    if (size < lanes) {
        const int rest = int(size);
        store_some(grad, sum_of_terms(load_some(z, rest), terms, num_terms), rest);
        return;
    }
    for (int64_t j = 0; j + lanes <= size; j += lanes)
        store(grad + j, sum_of_terms(load(z + j), terms, num_terms));
    store(grad + size - lanes, sum_of_terms(load(z + size - lanes), terms, num_terms));
}

// A single logit has softmax 1. For a logit of -inf the exponentials above give 0, so it is stored here.
template <class T>
static void store_impossible(const T* row, T* row_grad, LogitRange range, typename Math<T>::Scalar weight) {
    using Scalar = typename Math<T>::Scalar;
    using Vec = typename Math<T>::Vec;
    if (range.end - range.begin == 1 && widen(row[range.begin]) == -Scalar(__builtin_inf()))
        store_some(row_grad + range.begin, broadcast<Vec>(weight), 1);
}

// A log-sum-exp whose maximum is finite, so that z - maximum is -inf and not NaN where z is -inf.
template <class Scalar>
static LogSum<Scalar> above_infinity(Scalar maximum, Scalar log_sum) {
    const Scalar lowest = Scalar(-3e38);
    return {maximum < lowest ? lowest : maximum, log_sum};
}

template <class T>
static void level_ce_backward(const LevelCEArguments& p, int64_t first, int64_t last) {
    using Scalar = typename Math<T>::Scalar;
    for (int64_t b = first; b < last; ++b) {
        const T* z = static_cast<const T*>(p.logits) + b * p.num_logits;
        T* grad = static_cast<T*>(p.grad_logits) + b * p.num_logits;
        const Scalar* sums = static_cast<const Scalar*>(p.sums) + 6 * b;
        const Scalar g_loss = p.grad_loss == nullptr ? 0 : static_cast<const Scalar*>(p.grad_loss)[b];
        const Scalar g_ratio =
            p.grad_log_ratio == nullptr ? 0 : static_cast<const Scalar*>(p.grad_log_ratio)[b];
        const Term<Scalar> all{g_loss, above_infinity(sums[0], sums[1])};
        const Term<Scalar> truth{g_ratio - g_loss, above_infinity(sums[2], sums[3])};
        const Term<Scalar> noise{-g_ratio, above_infinity(sums[4], sums[5])};
        const LogitRange range = true_logits(p, b);
        const LogitRange noise_range = noise_logits(p);
        store_terms<T, 1>(z, grad, LogitRange{0, p.num_logits}, &all);
        const Term<Scalar> at_truth[2] = {all, truth}, at_noise[2] = {all, noise},
                           at_both[3] = {all, truth, noise};
        if (range.begin == noise_range.begin) {
            store_terms<T, 3>(z, grad, range, at_both);
            store_impossible(z, grad, range, -g_loss);
        } else {
            store_terms<T, 2>(z, grad, range, at_truth);
            store_terms<T, 2>(z, grad, noise_range, at_noise);
            store_impossible(z, grad, range, truth.weight);
            store_impossible(z, grad, noise_range, noise.weight);
        }
    }
}

// log of a sum of exponentials, the largest of which is 1; NaN stays NaN.
CDM_INLINE VecF log_of_sum(VecF sum) {
    VecF log{};
    for (int lane = 0; lane < lanes_of<float>(); ++lane) log[lane] = strict_log(sum[lane]);
    return sum == sum ? log : sum;
}

CDM_INLINE VecD log_of_sum(VecD sum) {
    for (int lane = 0; lane < lanes_of<double>(); ++lane) sum[lane] = __builtin_log(sum[lane]);
    return sum;
}

// logsumexp of the logits of as many levels as a vector has lanes, of which `levels` are used. A level takes
// a lane, so that few classes do not leave lanes idle. num_classes <= kFewClasses.
constexpr int64_t kFewClasses = 32;

template <class T>
CDM_INLINE typename Math<T>::Vec log_sums_across(const T* z, int64_t num_classes, int levels) {
    using Vec = typename Math<T>::Vec;
    constexpr int lanes = lanes_of<T>();
    Vec of_class[kFewClasses];
    for (int64_t c = 0; c < num_classes; ++c)
        for (int lane = 0; lane < lanes; ++lane)
            of_class[c][lane] = widen(z[(lane < levels ? lane : levels - 1) * num_classes + c]);
    Vec maximum = of_class[0];
    for (int64_t c = 1; c < num_classes; ++c) maximum = of_class[c] > maximum ? of_class[c] : maximum;
    Vec sum{};
    for (int64_t c = 0; c < num_classes; ++c) sum += exp_falling(of_class[c] - maximum);
    const Vec impossible = broadcast<Vec>(-typename Math<T>::Scalar(__builtin_inf()));
    return maximum == impossible ? impossible : maximum + log_of_sum(sum);
}

template <class T>
static void level_logits(const LevelLogitsArguments& p, int64_t first, int64_t last) {
    using Scalar = typename Math<T>::Scalar;
    constexpr int lanes = lanes_of<T>();
    const int64_t clean = p.num_levels - 1;  // pure noise, the last level, may have fewer logits
    for (int64_t b = first; b < last; ++b) {
        const T* z = static_cast<const T*>(p.logits) + b * p.num_logits;
        Scalar* out = static_cast<Scalar*>(p.level_logits) + b * p.num_levels;
        const auto one_level = [&](int64_t level, int64_t end) {
            const LogSum<Scalar> sum = log_sum_of(z, LogitRange{level * p.num_classes, end});
            out[level] = sum.maximum + sum.log_sum;
        };
        if (p.num_classes > kFewClasses) {
            for (int64_t t = 0; t < clean; ++t) one_level(t, (t + 1) * p.num_classes);
        } else {
            int64_t t = 0;
            for (; t + lanes <= clean; t += lanes)
                store(out + t, log_sums_across(z + t * p.num_classes, p.num_classes, lanes));
            const int rest = int(clean - t);
            if (rest > 0)
                store_some(out + t, log_sums_across(z + t * p.num_classes, p.num_classes, rest), rest);
        }
        one_level(clean, p.num_logits);
    }
}

}  // namespace CDM_ISA
