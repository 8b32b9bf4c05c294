// CPU loops of `attention`, compiled once per instruction set (for_each_isa.h).
#include "vec_body.h"

namespace CDM_ISA {

// Calls f(column, lanes) for every vector of a row; the last may be short.
template <class T, class F>
CDM_INLINE void for_each_vector(int64_t columns, F f) {
    constexpr int lanes = lanes_of<T>();
    int64_t j = 0;
    for (; j + lanes <= columns; j += lanes) f(j, lanes);
    if (j < columns) f(j, int(columns - j));
}

template <class T>
CDM_INLINE typename Math<T>::Vec load_part(const T* p, int lanes) {
    return lanes == lanes_of<T>() ? load(p) : load_some(p, lanes);
}

template <class T>
CDM_INLINE void store_part(T* p, typename Math<T>::Vec v, int lanes) {
    if (lanes == lanes_of<T>())
        store(p, v);
    else
        store_some(p, v, lanes);
}

// Sets the lanes from `lanes` on to 0, so that they do not count in sums.
template <class T>
CDM_INLINE typename Math<T>::Vec keep(typename Math<T>::Vec v, int lanes) {
    for (int lane = lanes; lane < lanes_of<T>(); ++lane) v[lane] = 0;
    return v;
}

template <class T>
static typename Math<T>::Scalar largest(const T* row, int64_t columns, typename Math<T>::Scalar scale) {
    using Scalar = typename Math<T>::Scalar;
    using Vec = typename Math<T>::Vec;
    Vec most = broadcast<Vec>(-Scalar(__builtin_inf()));
    for_each_vector<T>(columns, [&](int64_t j, int lanes) {
        Vec s = load_part(row + j, lanes) * scale;
        for (int lane = lanes; lane < lanes_of<T>(); ++lane) s[lane] = most[lane];
        most = s > most ? s : most;
    });
    Scalar result = most[0];
    for (int lane = 1; lane < lanes_of<T>(); ++lane) result = most[lane] > result ? most[lane] : result;
    return result;
}

// scores -> p; fills lse.
template <class T>
static void attention_softmax(const cdm::AttentionTile& a, int64_t first, int64_t last,
                              typename Math<T>::Scalar* scratch) {
    using Scalar = typename Math<T>::Scalar;
    using Vec = typename Math<T>::Vec;
    const Scalar scale = Scalar(a.scale);
    for (int64_t i = first; i < last; ++i) {
        T* row = static_cast<T*>(a.scores) + i * a.columns;
        const Scalar top = largest(row, a.columns, scale);
        Vec sum{};
        for_each_vector<T>(a.columns, [&](int64_t j, int lanes) {
            const Vec weight = exp(load_part(row + j, lanes) * scale - top);
            store(scratch + j, weight);
            sum += keep<T>(weight, lanes);
        });
        const Scalar total = sum_lanes<T>(sum, lanes_of<T>());
        const Scalar share = 1 / total;
        for_each_vector<T>(
            a.columns, [&](int64_t j, int lanes) { store_part(row + j, load(scratch + j) * share, lanes); });
        static_cast<Scalar*>(a.lse)[i] = top + Scalar(__builtin_log(double(total)));
    }
}

// scores -> p; grad_p -> grad_scores.
//
// lse is rounded, so that probabilities computed from it do not quite sum to one, nor rows of grad_scores to
// zero; the error shows where all keys share a large component. Dividing by the row's sum corrects it.
template <class T>
static void attention_vjp(const cdm::AttentionTile& a, int64_t first, int64_t last,
                          typename Math<T>::Scalar* scratch) {
    using Scalar = typename Math<T>::Scalar;
    using Vec = typename Math<T>::Vec;
    const Scalar scale = Scalar(a.scale);
    for (int64_t i = first; i < last; ++i) {
        T* scores = static_cast<T*>(a.scores) + i * a.columns;
        T* grad_p = static_cast<T*>(a.grad_p) + i * a.columns;
        const Scalar lse = static_cast<const Scalar*>(a.lse)[i];
        Vec sum{}, sum_grad{};
        for_each_vector<T>(a.columns, [&](int64_t j, int lanes) {
            const Vec p = keep<T>(exp(load_part(scores + j, lanes) * scale - lse), lanes);
            store(scratch + j, p);
            sum += p;
            sum_grad += p * load_part(grad_p + j, lanes);
        });
        const Scalar share = 1 / sum_lanes<T>(sum, lanes_of<T>());
        const Scalar delta = share * sum_lanes<T>(sum_grad, lanes_of<T>());
        for_each_vector<T>(a.columns, [&](int64_t j, int lanes) {
            const Vec p = load(scratch + j) * share;
            store_part(scores + j, p, lanes);
            store_part(grad_p + j, scale * p * (load_part(grad_p + j, lanes) - delta), lanes);
        });
    }
}

// scores -> p; scores_dot -> p_dot; grad_p -> grad_scores; grad_p_dot -> grad_scores_dot.
template <class T>
static void attention_vjp_backward(const cdm::AttentionTile& a, int64_t first, int64_t last,
                                   typename Math<T>::Scalar* scratch) {
    using Scalar = typename Math<T>::Scalar;
    using Vec = typename Math<T>::Vec;
    const Scalar scale = Scalar(a.scale);
    for (int64_t i = first; i < last; ++i) {
        T* scores = static_cast<T*>(a.scores) + i * a.columns;
        T* scores_dot = static_cast<T*>(a.scores_dot) + i * a.columns;
        T* grad_p = static_cast<T*>(a.grad_p) + i * a.columns;
        T* grad_p_dot = static_cast<T*>(a.grad_p_dot) + i * a.columns;
        const Scalar lse = static_cast<const Scalar*>(a.lse)[i];
        Vec sum{}, sum_dot{}, sum_grad{}, sum_grad_dot{};
        for_each_vector<T>(a.columns, [&](int64_t j, int lanes) {
            const Vec p = keep<T>(exp(load_part(scores + j, lanes) * scale - lse), lanes);
            store(scratch + j, p);
            sum += p;
            sum_dot += p * load_part(scores_dot + j, lanes);
            sum_grad += p * load_part(grad_p + j, lanes);
            sum_grad_dot += p * load_part(grad_p_dot + j, lanes);
        });
        const Scalar share = 1 / sum_lanes<T>(sum, lanes_of<T>());
        const Scalar mean = share * scale * sum_lanes<T>(sum_dot, lanes_of<T>());
        const Scalar delta = share * sum_lanes<T>(sum_grad, lanes_of<T>());
        for_each_vector<T>(a.columns, [&](int64_t j, int lanes) {
            const Vec p_dot = load(scratch + j) * (load_part(scores_dot + j, lanes) * scale - mean);
            sum_grad_dot += p_dot * (load_part(grad_p + j, lanes) - delta);
        });
        const Scalar delta_dot = share * sum_lanes<T>(sum_grad_dot, lanes_of<T>());
        for_each_vector<T>(a.columns, [&](int64_t j, int lanes) {
            const Vec p = load(scratch + j) * share;
            const Vec p_dot = p * (load_part(scores_dot + j, lanes) * scale - mean);
            const Vec centred = load_part(grad_p + j, lanes) - delta;
            const Vec changed = p_dot * centred + p * (load_part(grad_p_dot + j, lanes) - delta_dot);
            store_part(scores + j, p, lanes);
            store_part(scores_dot + j, p_dot, lanes);
            store_part(grad_p + j, scale * p * centred, lanes);
            store_part(grad_p_dot + j, scale * changed, lanes);
        });
    }
}

}  // namespace CDM_ISA
