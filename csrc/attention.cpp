// `attention` on the CPU: the computations between the matrix products, in passes over rows of the score
// matrix.
#include <cstdint>
#include <memory>

#include "attention.h"
#include "cpu_types.h"
#include "dispatch.h"

#define CDM_BODY "attention_body.h"
#include "for_each_isa.h"

namespace {

using cdm::AttentionTile;
using cdm::Tensor;

constexpr int64_t kMinElementsPerThread = 8 * 1024;
constexpr int64_t kWidestVector = 16;  // elements that a loop may write past a row of scratch

// Calls f(first row, last row, a row of scratch memory) for the rows of a tile, in parallel.
template <class T, class F>
void for_rows(const AttentionTile& a, const F& f) {
    using Compute = cdm::Compute<T>;
    const int64_t grain = 1 + kMinElementsPerThread / a.columns;
    torch::stable::parallel_for(0, a.rows, grain, [&](int64_t first, int64_t last) {
        const std::unique_ptr<Compute[]> scratch(new Compute[a.columns + kWidestVector]);
        f(first, last, scratch.get());
    });
}

AttentionTile tile_of(const Tensor& scores, const Tensor& lse, double scale) {
    AttentionTile a = {};
    a.scores = scores.data_ptr();
    a.lse = lse.data_ptr();
    a.columns = scores.size(-1);
    a.rows = scores.numel() / a.columns;
    a.scale = scale;
    return a;
}

void softmax(Tensor scores, Tensor lse, double scale) {
    const AttentionTile a = tile_of(scores, lse, scale);
    cdm::with_cpu_type("attention", scores.scalar_type(), [&](auto sample) {
        using T = decltype(sample);
        for_rows<T>(a, [&](int64_t first, int64_t last, auto* scratch) {
            CDM_DISPATCH(attention_softmax<T>(a, first, last, scratch));
        });
    });
}

void vjp(Tensor scores, Tensor grad_p, Tensor lse, double scale) {
    AttentionTile a = tile_of(scores, lse, scale);
    a.grad_p = grad_p.data_ptr();
    cdm::with_cpu_type("attention_vjp", scores.scalar_type(), [&](auto sample) {
        using T = decltype(sample);
        for_rows<T>(a, [&](int64_t first, int64_t last, auto* scratch) {
            CDM_DISPATCH(attention_vjp<T>(a, first, last, scratch));
        });
    });
}

void vjp_backward(Tensor scores, Tensor scores_dot, Tensor grad_p, Tensor grad_p_dot, Tensor lse,
                  double scale) {
    AttentionTile a = tile_of(scores, lse, scale);
    a.scores_dot = scores_dot.data_ptr();
    a.grad_p = grad_p.data_ptr();
    a.grad_p_dot = grad_p_dot.data_ptr();
    cdm::with_cpu_type("attention_vjp_backward", scores.scalar_type(), [&](auto sample) {
        using T = decltype(sample);
        for_rows<T>(a, [&](int64_t first, int64_t last, auto* scratch) {
            CDM_DISPATCH(attention_vjp_backward<T>(a, first, last, scratch));
        });
    });
}

}  // namespace

// Everything contiguous; the matrices (..., columns) in fp64, fp32 or bf16; lse in fp64 or fp32.
STABLE_TORCH_LIBRARY_FRAGMENT(cdm_fast_cpp, m) {
    m.def("attention_softmax(Tensor(a!) scores, Tensor(b!) lse, float scale) -> ()");
    m.def("attention_vjp(Tensor(a!) scores, Tensor(b!) grad_p, Tensor lse, float scale) -> ()");
    m.def(
        "attention_vjp_backward(Tensor(a!) scores, Tensor(b!) scores_dot, Tensor(c!) grad_p, Tensor(d!) "
        "grad_p_dot, "
        "Tensor lse, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cdm_fast_cpp, CPU, m) {
    m.impl("attention_softmax", TORCH_BOX(&softmax));
    m.impl("attention_vjp", TORCH_BOX(&vjp));
    m.impl("attention_vjp_backward", TORCH_BOX(&vjp_backward));
}
