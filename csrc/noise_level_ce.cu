// `noise_level_ce` on CUDA devices: torch.ops.cdm_fast.noise_level_ce and its backward. A block takes a row.
#include "cuda_common.cuh"
#include "noise_level_ce_op.h"

namespace cdm {
namespace {

constexpr int kThreads = 256;
constexpr float kLowest = -3.0e38f;  // below every logit, and still finite

// logsumexp as its maximum and the sum of exp(z - maximum).
struct Running {
    float maximum = kLowest, sum = 0.0f;

    __device__ __forceinline__ void add(float z) {
        const float higher = fmaxf(maximum, z);  // a NaN is not the maximum, but makes the sum NaN
        sum = sum * expf(maximum - higher) + expf(z - higher);
        maximum = higher;
    }

    __device__ __forceinline__ void merge(float other_maximum, float other_sum) {
        const float higher = fmaxf(maximum, other_maximum);
        sum = sum * expf(maximum - higher) + other_sum * expf(other_maximum - higher);
        maximum = higher;
    }
};

__device__ __forceinline__ void merge_warp(Running& running) {
    for (int lane = 16; lane > 0; lane /= 2) {
        const float maximum = __shfl_xor_sync(~0u, running.maximum, lane);
        const float sum = __shfl_xor_sync(~0u, running.sum, lane);
        running.merge(maximum, sum);
    }
}

// Elements before the first one at a multiple of 16 bytes, at most `size`.
template <typename T>
__device__ __forceinline__ int64_t unaligned_head(const T* p, int64_t size) {
    const int64_t head = static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T));
    return head < size ? head : size;
}

// logsumexp of z[begin, end), reading z once; every thread gets it.
template <typename T>
__device__ LogSum<float> log_sum_of(const T* row, LogitRange range, Running* shared) {
    constexpr int count = 16 / sizeof(T);
    const T* z = row + range.begin;
    const int64_t size = range.end - range.begin;
    if (size == 1) return {widen(z[0]), 0.0f};

    Running running;
    const int64_t head = unaligned_head(z, size);
    const int64_t packs = (size - head) / count;
    for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
        const Pack<T, count> pack = load_pack<count>(z + head + i * count);
        float most = kLowest;  // finite, also where every logit is -inf
#pragma unroll
        for (int k = 0; k < count; ++k) most = fmaxf(most, widen(pack.at[k]));
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < count; ++k) sum += expf(widen(pack.at[k]) - most);
        running.merge(most, sum);
    }
    const int64_t done = head + packs * count;
    for (int64_t i = threadIdx.x; i < head + size - done; i += kThreads)
        running.add(widen(z[i < head ? i : done + i - head]));

    merge_warp(running);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = running;
    __syncthreads();
    running = threadIdx.x % 32 < kThreads / 32 ? shared[threadIdx.x % 32] : Running();
    merge_warp(running);
    return {running.maximum, logf(running.sum)};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const LevelCEArguments p) {
    CDM_SHARED_ARRAY(Running, shared, kThreads / 32);
    const int64_t b = blockIdx.x;
    const T* z = static_cast<const T*>(p.logits) + b * p.num_logits;
    const LogitRange range = true_logits(p, b);
    const bool known = range.end > range.begin;
    LogSum<float> all = log_sum_of(z, LogitRange{0, p.num_logits}, shared);
    const LogSum<float> noise = log_sum_of(z, noise_logits(p), shared);
    LogSum<float> truth = {nanf(""), nanf("")};
    if (known)
        truth = log_sum_of(z, range, shared);
    else
        all = truth;
    if (threadIdx.x != 0) return;
    static_cast<float*>(p.loss)[b] = log_quotient(all, truth);
    static_cast<float*>(p.log_ratio)[b] = log_quotient(truth, noise);
    float* sums = static_cast<float*>(p.sums) + 6 * b;
    sums[0] = all.maximum;
    sums[1] = all.log_sum;
    sums[2] = truth.maximum;
    sums[3] = truth.log_sum;
    sums[4] = noise.maximum;
    sums[5] = noise.log_sum;
}

// The softmax within a range of logits.
struct Softmax {
    LogitRange range;
    float maximum, log_sum;

    __device__ __forceinline__ Softmax(LogitRange logits, const float* sums)
        : range(logits), maximum(sums[0] < kLowest ? kLowest : sums[0]), log_sum(sums[1]) {}

    __device__ __forceinline__ float at(float z) const {
        if (range.end - range.begin == 1) return 1.0f;  // also of a logit of -inf
        return expf((z - maximum) - log_sum);
    }
};

struct RowGradient {
    Softmax all, truth, noise;
    float g_loss, g_ratio;

    __device__ __forceinline__ float at(float z, int64_t j) const {
        float grad = g_loss * all.at(z);
        if (j >= truth.range.begin && j < truth.range.end) grad += (g_ratio - g_loss) * truth.at(z);
        if (j >= noise.range.begin) grad -= g_ratio * noise.at(z);
        return grad;
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const LevelCEArguments p) {
    constexpr int count = 16 / sizeof(T);
    const int64_t b = blockIdx.x;
    const T* z = static_cast<const T*>(p.logits) + b * p.num_logits;
    T* grad = static_cast<T*>(p.grad_logits) + b * p.num_logits;
    const float* sums = static_cast<const float*>(p.sums) + 6 * b;
    const LogitRange truth = true_logits(p, b);
    const RowGradient row = {
        Softmax(LogitRange{0, p.num_logits}, sums), Softmax(truth, sums + 2),
        Softmax(noise_logits(p), sums + 4),
        p.grad_loss == nullptr ? 0.0f : static_cast<const float*>(p.grad_loss)[b],
        p.grad_log_ratio == nullptr ? 0.0f : static_cast<const float*>(p.grad_log_ratio)[b]};

    // Whether the rows of both tensors have the same offset from a multiple of 16 bytes.
    const bool together = reinterpret_cast<uintptr_t>(z) % 16 == reinterpret_cast<uintptr_t>(grad) % 16;
    const int64_t head = together ? unaligned_head(z, p.num_logits) : p.num_logits;
    const int64_t packs = (p.num_logits - head) / count;
    for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
        const int64_t first = head + i * count;
        const Pack<T, count> pack = load_pack<count>(z + first);
        Pack<T, count> out;
#pragma unroll
        for (int k = 0; k < count; ++k) narrow(row.at(widen(pack.at[k]), first + k), &out.at[k]);
        store_pack<count>(grad + first, out);
    }
    const int64_t done = head + packs * count;
    for (int64_t i = threadIdx.x; i < head + p.num_logits - done; i += kThreads) {
        const int64_t j = i < head ? i : done + i - head;
        narrow(row.at(widen(z[j]), j), grad + j);
    }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& level,
                                           const std::optional<Tensor>& label, int64_t num_levels,
                                           int64_t num_classes) {
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
    const cudaStream_t stream = stream_of(logits);
    const auto launch = [&](const LevelCEArguments& arguments, ScalarType type) {
        with_float_type(type, [&](auto sample) {
            launch_kernel({"noise_level_ce", arguments.batch, kThreads, stream},
                          forward_kernel<decltype(sample)>, arguments);
        });
    };
    return level_ce_op(logits, level, label, num_levels, num_classes, launch);
}

Tensor backward(const Tensor& logits, const Tensor& level, const std::optional<Tensor>& label,
                int64_t num_levels, int64_t num_classes, const Tensor& sums,
                const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_log_ratio) {
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
    const cudaStream_t stream = stream_of(logits);
    const auto launch = [&](const LevelCEArguments& arguments, ScalarType type) {
        with_float_type(type, [&](auto sample) {
            launch_kernel({"noise_level_ce_backward", arguments.batch, kThreads, stream},
                          backward_kernel<decltype(sample)>, arguments);
        });
    };
    return level_ce_backward_op(logits, level, label, num_levels, num_classes, sums, grad_loss,
                                grad_log_ratio, launch);
}

}  // namespace
}  // namespace cdm

STABLE_TORCH_LIBRARY_IMPL(cdm_fast, CUDA, m) {
    m.impl("noise_level_ce", TORCH_BOX(&cdm::forward));
    m.impl("noise_level_ce_backward", TORCH_BOX(&cdm::backward));
}
