// Small kernels, right ones and ones with a fault each, to see what the stand-in makes of them.
//
//     faults KERNEL ORDER
//
// prints "ok", "wrong: ..." for a wrong result, "error: ..." for a CUDA error and "fault: ..." for what the
// stand-in itself reports. AddressSanitizer and UBSan end the program with their own report.
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

extern "C" void cuda_on_cpu_set_order(const char* name);

namespace {

constexpr int kThreads = 128, kBlocks = 3, kSize = kThreads * kBlocks;

enum class Fault {
    none,
    missing_barrier,
    missing_second_barrier,
    divergent_barrier,
    barrier_after_return,
    shared_read,
    shared_write,
    global_read,
    unset_shared,
    lane_before
};

// Reverses each block's part of `in`, twice.
template <Fault fault>
__global__ void reverse_twice(const float* in, float* out) {
    CDM_SHARED_ARRAY(float, shared, kThreads);
    const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
    if (fault == Fault::barrier_after_return && t == 5) return;
    if (fault != Fault::unset_shared || t != 7) shared[t] = in[fault == Fault::global_read ? i + 1 : i];
    if (fault == Fault::shared_write && t == 9) shared[kThreads] = 1.0f;
    // In natural order the thread before has written; no thread may count on that.
    if (fault == Fault::lane_before && t > 0) shared[t] += 0.0f * shared[t - 1];
    if (fault != Fault::missing_barrier && (fault != Fault::divergent_barrier || t != 3)) __syncthreads();
    const float once = shared[kThreads - (fault == Fault::shared_read ? 0 : 1) - t];
    if (fault != Fault::missing_second_barrier) __syncthreads();
    shared[t] = once;
    __syncthreads();
    out[i] = shared[kThreads - 1 - t];
}

// The same through dynamic shared memory, once, and back in the index.
template <bool beyond>
__global__ void reverse_in_dynamic(const float* in, float* out) {
    CDM_DYNAMIC_SHARED(float, shared);
    const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
    shared[t] = in[i];
    __syncthreads();
    out[i - t + kThreads - 1 - t] = shared[kThreads - 1 - t + (beyond ? 1 : 0)];
}

enum class ShuffleFault { none, return_before, one_lane_elsewhere };

// Adds the lanes of a warp; every lane writes its own number, if the sum is that of 0..31.
template <ShuffleFault fault>
__global__ void sum_of_warp(const float* in, float* out) {
    const int t = threadIdx.x, i = blockIdx.x * kThreads + t, lane = t % 32;
    if (fault == ShuffleFault::return_before && lane == 31) return;
    float sum = static_cast<float>(lane);
    for (int other = 16; other > 0; other /= 2) {
        if (fault == ShuffleFault::one_lane_elsewhere && t == 33)
            sum += __shfl_down_sync(~0u, sum, 1);
        else
            sum += __shfl_xor_sync(~0u, sum, other);
    }
    out[i] = sum == 496.0f ? in[i] : -1.0f;
}

struct alignas(16) Four {
    float at[4];
};

template <int offset>
__global__ void copy_packs(const float* in, float* out) {
    const int i = (blockIdx.x * kThreads + threadIdx.x) * 4;
    if (i + 4 + offset > kSize) return;
    *reinterpret_cast<Four*>(out + i) = *reinterpret_cast<const Four*>(in + i + offset);
}

__global__ void copy(const float* in, float* out) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < kSize) out[i] = in[i];
}

using Kernel = void (*)(const float*, float*);

cudaError_t launch(Kernel kernel, const float* in, float* out, dim3 grid = kBlocks, dim3 block = kThreads,
                   size_t shared = 0, cudaStream_t stream = cuda_on_cpu::current_stream()) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, in, out);
}

using Case = std::function<cudaError_t(const float*, float*)>;

Case of(Kernel kernel, dim3 grid = kBlocks, dim3 block = kThreads, size_t shared = 0) {
    return [=](const float* in, float* out) { return launch(kernel, in, out, grid, block, shared); };
}

cudaError_t with_much_shared(const float* in, float* out, int bytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(reverse_in_dynamic<false>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return error != cudaSuccess ? error
                                : launch(reverse_in_dynamic<false>, in, out, kBlocks, kThreads, bytes);
}

const std::map<std::string, Case> cases = {
    {"reverse", of(reverse_twice<Fault::none>)},
    {"missing-barrier", of(reverse_twice<Fault::missing_barrier>)},
    {"missing-second-barrier", of(reverse_twice<Fault::missing_second_barrier>)},
    {"reads-the-lane-before", of(reverse_twice<Fault::lane_before>)},
    {"divergent-barrier", of(reverse_twice<Fault::divergent_barrier>)},
    {"barrier-after-return", of(reverse_twice<Fault::barrier_after_return>)},
    {"shared-read-beyond", of(reverse_twice<Fault::shared_read>)},
    {"shared-write-beyond", of(reverse_twice<Fault::shared_write>)},
    {"global-read-beyond", of(reverse_twice<Fault::global_read>)},
    {"unset-shared", of(reverse_twice<Fault::unset_shared>)},
    {"dynamic", of(reverse_in_dynamic<false>, kBlocks, kThreads, kThreads * sizeof(float))},
    {"dynamic-read-beyond", of(reverse_in_dynamic<true>, kBlocks, kThreads, kThreads * sizeof(float))},
    {"dynamic-too-small", of(reverse_in_dynamic<false>, kBlocks, kThreads, kThreads * sizeof(float) / 2)},
    {"warp-sum", of(sum_of_warp<ShuffleFault::none>)},
    {"return-before-shuffle", of(sum_of_warp<ShuffleFault::return_before>)},
    {"shuffles-apart", of(sum_of_warp<ShuffleFault::one_lane_elsewhere>)},
    {"partial-warp", of(sum_of_warp<ShuffleFault::none>, kBlocks, 33)},
    {"packs", of(copy_packs<0>)},
    {"misaligned-packs", of(copy_packs<1>)},
    {"copy", of(copy)},
    {"threads-1025", of(copy, 1, 1025)},
    {"no-blocks", of(copy, 0)},
    {"grid-y-65536", of(copy, dim3(1, 65536))},
    {"grid-y-65535", of(copy, dim3(kBlocks, 65535))},
    {"shared-49153", of(copy, kBlocks, kThreads, 48 * 1024 + 1)},
    {"shared-232448", [](auto in, auto out) { return with_much_shared(in, out, 227 * 1024); }},
    {"shared-232449", [](auto in, auto out) { return with_much_shared(in, out, 227 * 1024 + 1); }},
    {"other-stream", [](auto in, auto out) { return launch(copy, in, out, kBlocks, kThreads, 0, nullptr); }},
    {"no-device-guard",
     [](auto in, auto out) {
         cuda_on_cpu::leave_device();
         return launch(copy, in, out);
     }},
};

// Looks at the result, and at whether the error of a failed call is there once, and then gone.
std::string outcome(const Case& run) {
    std::vector<float> in(kSize), out(kSize, -1.0f);
    for (int i = 0; i < kSize; ++i) in[i] = static_cast<float>(i);
    const cudaError_t error = run(in.data(), out.data());
    if (cudaGetLastError() != error) return "wrong: cudaGetLastError() tells something else";
    if (cudaGetLastError() != cudaSuccess) return "wrong: cudaGetLastError() tells it twice";
    if (error != cudaSuccess) return std::string("error: ") + cudaGetErrorString(error);
    for (int i = 0; i < kSize; ++i)
        if (!(out[i] == in[i])) return "wrong: out[" + std::to_string(i) + "] = " + std::to_string(out[i]);
    return "ok";
}

}  // namespace

int main(int, char** arguments) {
    cuda_on_cpu_set_order(arguments[2]);
    cuda_on_cpu::enter_device();
    try {
        std::printf("%s\n", outcome(cases.at(arguments[1])).c_str());
    } catch (const std::logic_error& fault) {
        std::printf("fault: %s\n", fault.what());
    }
}
