// `attention` on the CPU: what lies between the matrix products, one pass over rows of the score matrix.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>

#include "attention.h"
#include "bf16.h"
#include "dispatch.h"

#define CDM_BODY "attention_body.h"
#include "for_each_isa.h"

namespace {

using cdm::AttentionTile;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMinElementsPerThread = 8 * 1024;
constexpr int64_t kWidestVector = 16;  // elements that a loop may write past a row of scratch

template <class Compute, class F>
void for_rows(const AttentionTile& a, F f) {
    const int64_t grain = 1 + kMinElementsPerThread / a.columns;
    torch::stable::parallel_for(0, a.rows, grain, [&](int64_t first, int64_t last) {
        const std::unique_ptr<Compute[]> scratch(new Compute[a.columns + kWidestVector]);
        f(first, last, scratch.get());
    });
}

template <class T, class Compute>
void softmax_rows(const AttentionTile& a) {
    for_rows<Compute>(a, [&](int64_t first, int64_t last, Compute* scratch) {
        CDM_DISPATCH(attention_softmax<T>(a, first, last, scratch));
    });
}

template <class T, class Compute>
void vjp_rows(const AttentionTile& a) {
    for_rows<Compute>(a, [&](int64_t first, int64_t last, Compute* scratch) {
        CDM_DISPATCH(attention_vjp<T>(a, first, last, scratch));
    });
}

template <class T, class Compute>
void vjp_backward_rows(const AttentionTile& a) {
    for_rows<Compute>(a, [&](int64_t first, int64_t last, Compute* scratch) {
        CDM_DISPATCH(attention_vjp_backward<T>(a, first, last, scratch));
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
    switch (scores.scalar_type()) {
        case ScalarType::Double:
            return softmax_rows<double, double>(a);
        case ScalarType::BFloat16:
            return softmax_rows<cdm::bf16, float>(a);
        default:
            return softmax_rows<float, float>(a);
    }
}

void vjp(Tensor scores, Tensor grad_p, Tensor lse, double scale) {
    AttentionTile a = tile_of(scores, lse, scale);
    a.grad_p = grad_p.data_ptr();
    switch (scores.scalar_type()) {
        case ScalarType::Double:
            return vjp_rows<double, double>(a);
        case ScalarType::BFloat16:
            return vjp_rows<cdm::bf16, float>(a);
        default:
            return vjp_rows<float, float>(a);
    }
}

void vjp_backward(Tensor scores, Tensor scores_dot, Tensor grad_p, Tensor grad_p_dot, Tensor lse,
                  double scale) {
    AttentionTile a = tile_of(scores, lse, scale);
    a.scores_dot = scores_dot.data_ptr();
    a.grad_p = grad_p.data_ptr();
    a.grad_p_dot = grad_p_dot.data_ptr();
    switch (scores.scalar_type()) {
        case ScalarType::Double:
            return vjp_backward_rows<double, double>(a);
        case ScalarType::BFloat16:
            return vjp_backward_rows<cdm::bf16, float>(a);
        default:
            return vjp_backward_rows<float, float>(a);
    }
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
