// Functions that all CUDA kernels use: 16-byte packs, conversions to and from fp32, streams, launches.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // declares the stream functions of the stable ABI
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "tensors.h"

// Shared memory is declared by these macros, so that tests/cuda_on_cpu can give it bounds on a host.
#ifndef CDM_SHARED_ARRAY
#define CDM_SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define CDM_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

namespace cdm {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(uint8_t value) { return static_cast<float>(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void narrow(float value, float* out) { *out = value; }
__device__ __forceinline__ void narrow(float value, __half* out) { *out = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

// Consecutive elements that are loaded or stored together, at most 16 bytes in one access.
template <typename T, int count>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Pack {
    T at[count];
};

template <int count, typename T>
__device__ __forceinline__ Pack<T, count> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T, count>*>(p);
}

template <int count, typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, count>& pack) {
    *reinterpret_cast<Pack<T, count>*>(p) = pack;
}

// Elements that are computed in fp32, whatever their type in memory.
template <int count, typename T>
__device__ __forceinline__ Pack<float, count> load_widened(const T* from) {
    const Pack<T, count> stored = load_pack<count>(from);
    Pack<float, count> values;
#pragma unroll
    for (int i = 0; i < count; ++i) values.at[i] = widen(stored.at[i]);
    return values;
}

template <int count, typename T>
__device__ __forceinline__ void store_narrowed(T* to, const Pack<float, count>& values) {
    Pack<T, count> stored;
#pragma unroll
    for (int i = 0; i < count; ++i) narrow(values.at[i], &stored.at[i]);
    store_pack<count>(to, stored);
}

// Sum over the threads of a warp, in a fixed order; all of them get it.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
    return value;
}

// Sum over the threads of a block, in a fixed order; only thread 0 gets it. `shared` holds 32 floats.
__device__ __forceinline__ float block_sum(float value, float* shared) {
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_down_sync(~0u, value, lane);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x < blockDim.x / 32 ? shared[threadIdx.x] : 0.0f;
    if (threadIdx.x < 32)
        for (int lane = 16; lane > 0; lane /= 2) value += __shfl_down_sync(~0u, value, lane);
    __syncthreads();
    return value;
}

// Whether 16-byte accesses may start at each of these pointers (null ones are not used).
inline bool are_aligned(std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers)
        if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
    return true;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// PyTorch's current stream on the tensor's device.
inline cudaStream_t stream_of(const Tensor& tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
    return static_cast<cudaStream_t>(stream);
}

// Throws if a call failed. The runtime also keeps the error for the next cudaGetLastError(), which may follow
// a call that succeeded; reading it here clears it.
inline void check(cudaError_t error, const char* op) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

// Raises the dynamic shared memory that blocks of `kernel` may have; false if the device has less.
template <typename... Parameters>
bool allow_shared(void (*kernel)(Parameters...), int64_t bytes) {
    constexpr int64_t always_allowed = 48 * 1024;
    if (bytes <= always_allowed) return true;
    if (bytes > std::numeric_limits<int>::max()) return false;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) ==
        cudaSuccess)
        return true;
    cudaGetLastError();  // clears the error, which the next launch would report
    return false;
}

struct Launch {
    const char* op;  // what an error names
    int64_t blocks;
    int threads;
    cudaStream_t stream;
    int64_t shared_bytes = 0;
};

// Every launch goes through here. Blocks are numbered along x, which takes 2^31 - 1 of them (y and z:
// 65,535).
template <typename... Parameters, typename... Arguments>
void launch_kernel(const Launch& launch, void (*kernel)(Parameters...), Arguments&&... arguments) {
    constexpr int64_t most = std::numeric_limits<int>::max();
    if (launch.blocks > most)
        throw std::runtime_error(std::string(launch.op) + ": " + std::to_string(launch.blocks) +
                                 " blocks are more than the " + std::to_string(most) +
                                 " of one launch; call it on parts of the batch");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
    config.blockDim = dim3(static_cast<unsigned>(launch.threads));
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.stream = launch.stream;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), launch.op);
}

// Calls f(a value of the C++ type of `type`): fp32, bf16 or fp16; throws for any other.
template <typename F>
void with_float_type(ScalarType type, const F& f) {
    switch (type) {
        case ScalarType::BFloat16:
            return f(__nv_bfloat16());
        case ScalarType::Half:
            return f(__half());
        case ScalarType::Float:
            return f(float());
        default:
            throw std::runtime_error("the CUDA kernels take float32, bfloat16 and float16");
    }
}

}  // namespace cdm
