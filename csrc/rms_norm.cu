// `rms_norm` on CUDA devices: forward, VJP, and the derivative of the VJP, in fp32, bf16 and fp16.
//
// A warp takes a token and reads its channels twice, the second time from the cache. Where the gradient of
// the weight is wanted a block takes all tokens of an image, and its warps add up their share in shared
// memory, in a fixed order.
#include "cuda_common.cuh"
#include "rms_norm_op.h"

namespace cdm {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

template <typename T, int pack>
struct TokenWorker {
    using Values = Pack<float, pack>;

    const RmsNorm& a;
    const float* const weight;
    float* const partial;  // (C), this warp's share of the weight's gradient; null where it is not wanted

    static __device__ __forceinline__ Values read(const void* tensor, int64_t at) {
        return load_widened<pack>(static_cast<const T*>(tensor) + at);
    }

    static __device__ __forceinline__ void write(void* tensor, int64_t at, const Values& values) {
        store_narrowed<pack>(static_cast<T*>(tensor) + at, values);
    }

    // Calls f(first channel) for each pack of this lane.
    template <class F>
    __device__ __forceinline__ void for_each_pack(F f) const {
        for (int64_t channel = threadIdx.x % 32 * pack; channel < a.channels; channel += 32 * pack)
            f(channel);
    }

    __device__ __forceinline__ float mean(float sum) const {
        return warp_sum(sum) / static_cast<float>(a.channels);
    }

    __device__ __forceinline__ void forward(int64_t token) const {
        const int64_t start = token * a.channels;
        float sum = 0;
        for_each_pack([&](int64_t channel) {
            const Values x = read(a.x, start + channel);
#pragma unroll
            for (int i = 0; i < pack; ++i) sum += x.at[i] * x.at[i];
        });
        const float rstd = 1.0f / sqrtf(mean(sum) + static_cast<float>(a.eps));
        if (threadIdx.x % 32 == 0) static_cast<float*>(a.rstd)[token] = rstd;
        for_each_pack([&](int64_t channel) {
            Values y = read(a.x, start + channel);
#pragma unroll
            for (int i = 0; i < pack; ++i) y.at[i] = weight[channel + i] * (y.at[i] * rstd);
            write(a.y, start + channel, y);
        });
    }

    template <bool of_weight>
    __device__ __forceinline__ void vjp(int64_t token) const {
        const int64_t start = token * a.channels;
        const float rstd = static_cast<const float*>(a.rstd)[token];
        float sum = 0;
        for_each_pack([&](int64_t channel) {
            const Values x = read(a.x, start + channel), g = read(a.g, start + channel);
#pragma unroll
            for (int i = 0; i < pack; ++i) sum += g.at[i] * weight[channel + i] * (x.at[i] * rstd);
        });
        const float mean_px = mean(sum);
        for_each_pack([&](int64_t channel) {
            const Values x = read(a.x, start + channel), g = read(a.g, start + channel);
            Values grad_x;
#pragma unroll
            for (int i = 0; i < pack; ++i) {
                const float xhat = x.at[i] * rstd;
                if constexpr (of_weight) partial[channel + i] += g.at[i] * xhat;
                grad_x.at[i] = rstd * (g.at[i] * weight[channel + i] - xhat * mean_px);
            }
            write(a.grad_x, start + channel, grad_x);
        });
    }

    __device__ __forceinline__ void vjp_backward(int64_t token) const {
        const int64_t start = token * a.channels;
        const float rstd = static_cast<const float*>(a.rstd)[token];
        float sum_px = 0, sum_vx = 0, sum_vp = 0;
        for_each_pack([&](int64_t channel) {
            const Values x = read(a.x, start + channel), g = read(a.g, start + channel);
            const Values v = read(a.v, start + channel);
#pragma unroll
            for (int i = 0; i < pack; ++i) {
                const float xhat = x.at[i] * rstd, p = g.at[i] * weight[channel + i];
                sum_px += p * xhat;
                sum_vx += v.at[i] * xhat;
                sum_vp += v.at[i] * p;
            }
        });
        const float mean_px = mean(sum_px), mean_vx = mean(sum_vx), mean_vp = mean(sum_vp);
        const float slope = 3 * mean_vx * mean_px - mean_vp;
        for_each_pack([&](int64_t channel) {
            const Values x = read(a.x, start + channel), g = read(a.g, start + channel);
            const Values v = read(a.v, start + channel);
            Values grad_x, grad_g;
#pragma unroll
            for (int i = 0; i < pack; ++i) {
                const float xhat = x.at[i] * rstd, factor = weight[channel + i];
                const float q = rstd * (v.at[i] - xhat * mean_vx);
                partial[channel + i] += q * g.at[i];
                grad_g.at[i] = q * factor;
                grad_x.at[i] = rstd * rstd * (xhat * slope - v.at[i] * mean_px - g.at[i] * factor * mean_vx);
            }
            write(a.grad_g, start + channel, grad_g);
            write(a.grad_x, start + channel, grad_x);
        });
    }
};

enum class Task { forward, vjp, vjp_backward };

// Chunks of the tokens of each image; a block takes one.
template <typename T, int pack, Task task, bool of_weight>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const RmsNorm a, int64_t chunks, int64_t chunk) {
    CDM_DYNAMIC_SHARED(float, shared);
    const int warp = threadIdx.x / 32;
    const int64_t image = blockIdx.x / chunks, first = blockIdx.x % chunks * chunk;
    const int64_t last = first + chunk < a.tokens ? first + chunk : a.tokens;
    const float* const weight = static_cast<const float*>(a.weight) + image * a.parameter_stride;
    float* partial = nullptr;
    if constexpr (of_weight) partial = shared + warp * a.channels;
    const TokenWorker<T, pack> worker{a, weight, partial};
    if constexpr (of_weight)
        worker.for_each_pack([&](int64_t channel) {
            for (int i = 0; i < pack; ++i) partial[channel + i] = 0;
        });
    for (int64_t token = image * a.tokens + first + warp; token < image * a.tokens + last; token += kWarps) {
        if constexpr (task == Task::forward) worker.forward(token);
        if constexpr (task == Task::vjp) worker.template vjp<of_weight>(token);
        if constexpr (task == Task::vjp_backward) worker.vjp_backward(token);
    }
    if constexpr (of_weight) {
        __syncthreads();
        for (int64_t channel = threadIdx.x; channel < a.channels; channel += kThreads) {
            float total = 0;
            for (int i = 0; i < kWarps; ++i) total += shared[i * a.channels + channel];
            static_cast<float*>(a.grad_weight)[image * a.channels + channel] = total;
        }
    }
}

template <typename T, int pack, Task task, bool of_weight>
void launch_task(const RmsNorm& a, cudaStream_t stream) {
    const auto function = rms_norm_kernel<T, pack, task, of_weight>;
    const int64_t chunk = of_weight ? a.tokens : kWarps, chunks = ceil_div(a.tokens, chunk);
    const int64_t bytes = of_weight ? static_cast<int64_t>(sizeof(float)) * kWarps * a.channels : 0;
    if (!allow_shared(function, bytes))
        throw std::runtime_error("rms_norm: " + std::to_string(a.channels) +
                                 " channels are more than this GPU's shared memory holds; use the triton or "
                                 "the reference backend");
    launch_kernel({"rms_norm", a.batch * chunks, kThreads, stream, bytes}, function, a, chunks, chunk);
}

template <typename T, int pack>
void choose_task(const RmsNorm& a, cudaStream_t stream) {
    if (a.v != nullptr) return launch_task<T, pack, Task::vjp_backward, true>(a, stream);
    if (a.grad_weight != nullptr) return launch_task<T, pack, Task::vjp, true>(a, stream);
    if (a.g != nullptr) return launch_task<T, pack, Task::vjp, false>(a, stream);
    launch_task<T, pack, Task::forward, false>(a, stream);
}

struct RmsNormOnCuda {
    static void run(const RmsNorm& a, ScalarType dtype, const Tensor& x) {
        const torch::stable::accelerator::DeviceGuard guard(x.get_device());
        const cudaStream_t stream = stream_of(x);
        with_float_type(dtype, [&](auto element) {
            using T = decltype(element);
            constexpr int pack = 16 / sizeof(T);
            if (a.channels % pack == 0 && are_aligned({a.x, a.y, a.g, a.v, a.grad_x, a.grad_g}))
                return choose_task<T, pack>(a, stream);
            choose_task<T, 1>(a, stream);
        });
    }

    static Tensor sum_over_images(const Tensor& per_image) {
        const int64_t batch = 0;
        return torch::stable::sum(per_image, torch::headeronly::IntHeaderOnlyArrayRef(&batch, 1));
    }
};

}  // namespace
}  // namespace cdm

CDM_IMPLEMENT_RMS_NORM(CUDA, cdm::RmsNormOnCuda)
