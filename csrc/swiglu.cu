// `swiglu` on CUDA devices: forward, VJP, and the derivative of the VJP, in fp32, bf16 and fp16. A thread
// takes neighbouring channels of a token.
#include "cuda_common.cuh"
#include "dropout.cuh"
#include "swiglu_op.h"

namespace cdm {
namespace {

constexpr int kThreads = 256;

template <typename T, int pack>
struct Gate {
    using Values = Pack<float, pack>;

    const Swiglu& a;
    const int64_t first;  // element of the narrow tensors
    const int64_t wide;   // that of the gate in the wide ones; the value is H further

    static __device__ __forceinline__ Values read(const void* tensor, int64_t at) {
        return load_widened<pack>(static_cast<const T*>(tensor) + at);
    }

    static __device__ __forceinline__ void write(void* tensor, int64_t at, const Values& values) {
        store_narrowed<pack>(static_cast<T*>(tensor) + at, values);
    }

    __device__ __forceinline__ void drop(Values& values) const {
        if (a.seed == nullptr) return;
        drop_words(a, a.seed[2] * a.image_tokens * a.hidden + first, 1, values);
    }

    __device__ __forceinline__ void run() const {
        const Values gate = read(a.h, wide), value = read(a.h, wide + a.hidden);
        Values sigmoid, silu;
#pragma unroll
        for (int i = 0; i < pack; ++i) {
            sigmoid.at[i] = 1.0f / (1.0f + expf(-gate.at[i]));
            silu.at[i] = gate.at[i] * sigmoid.at[i];
        }
        if (a.g == nullptr) {
            Values y;
#pragma unroll
            for (int i = 0; i < pack; ++i) y.at[i] = silu.at[i] * value.at[i];
            drop(y);
            return write(a.y, first, y);
        }
        Values g = read(a.g, first);
        drop(g);
        Values slope;
#pragma unroll
        for (int i = 0; i < pack; ++i) slope.at[i] = sigmoid.at[i] + silu.at[i] * (1 - sigmoid.at[i]);
        if (a.v == nullptr) return vjp(g, value, silu, slope);
        vjp_backward(g, gate, value, sigmoid, silu, slope);
    }

    __device__ __forceinline__ void vjp(const Values& g, const Values& value, const Values& silu,
                                        const Values& slope) const {
        Values of_gate, of_value;
#pragma unroll
        for (int i = 0; i < pack; ++i) {
            of_gate.at[i] = g.at[i] * value.at[i] * slope.at[i];
            of_value.at[i] = g.at[i] * silu.at[i];
        }
        write(a.grad_h, wide, of_gate);
        write(a.grad_h, wide + a.hidden, of_value);
    }

    __device__ __forceinline__ void vjp_backward(const Values& g, const Values& gate, const Values& value,
                                                 const Values& sigmoid, const Values& silu,
                                                 const Values& slope) const {
        const Values v_gate = read(a.v, wide), v_value = read(a.v, wide + a.hidden);
        Values grad_g, of_gate, of_value;
#pragma unroll
        for (int i = 0; i < pack; ++i) {
            const float curve =
                sigmoid.at[i] * (1 - sigmoid.at[i]) * (2 + gate.at[i] * (1 - 2 * sigmoid.at[i]));
            grad_g.at[i] = v_gate.at[i] * value.at[i] * slope.at[i] + v_value.at[i] * silu.at[i];
            of_gate.at[i] = g.at[i] * (v_gate.at[i] * value.at[i] * curve + v_value.at[i] * slope.at[i]);
            of_value.at[i] = g.at[i] * v_gate.at[i] * slope.at[i];
        }
        drop(grad_g);
        write(a.grad_g, first, grad_g);
        write(a.grad_h, wide, of_gate);
        write(a.grad_h, wide + a.hidden, of_value);
    }
};

template <typename T, int pack>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const Swiglu a) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * pack;
    if (first >= a.tokens * a.hidden) return;
    const Gate<T, pack> gate{a, first, first + first / a.hidden * a.hidden};
    gate.run();
}

template <typename T, int pack>
void launch_swiglu(const Swiglu& a, cudaStream_t stream) {
    const int64_t blocks = ceil_div(a.tokens * a.hidden, kThreads * pack);
    launch_kernel({"swiglu", blocks, kThreads, stream}, swiglu_kernel<T, pack>, a);
}

struct SwigluOnCuda {
    static void run(const Swiglu& a, ScalarType dtype, const Tensor& h) {
        const torch::stable::accelerator::DeviceGuard guard(h.get_device());
        const cudaStream_t stream = stream_of(h);
        with_float_type(dtype, [&](auto element) {
            using T = decltype(element);
            constexpr int pack = 16 / sizeof(T);
            if (a.hidden % pack == 0 && are_aligned({a.h, a.y, a.g, a.v, a.grad_h, a.grad_g}))
                return launch_swiglu<T, pack>(a, stream);
            launch_swiglu<T, 1>(a, stream);
        });
    }
};

}  // namespace
}  // namespace cdm

CDM_IMPLEMENT_SWIGLU(CUDA, cdm::SwigluOnCuda)
