// What csrc/*.cu need of <cuda_runtime.h>, for the host compiler: see ../README.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

// `__shared__` and `<<< >>>` are left undefined: sources go through CDM_SHARED_ARRAY, CDM_DYNAMIC_SHARED and
// cudaLaunchKernelEx, where bounds and limits can be looked at.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs now; threads run one at a time.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

cudaError_t cudaGetLastError();  // and forgets it
const char* cudaGetErrorString(cudaError_t error);

namespace cuda_on_cpu {

// Where a thread waits: barriers and shuffles are told apart by their place in the source.
struct Place {
    const char* file;
    int line;
};

void wait_for_block(Place place);

// Hands `value` (at most 8 bytes) to the other lanes of the warp and returns that of lane `from` of the
// block.
uint64_t exchange(uint64_t value, unsigned from, unsigned mask, Place place);

// Memory of one block: the first thread of each block that asks for it finds it full of NaN.
class SharedArray {
  public:
    explicit SharedArray(size_t bytes);
    void* of_this_block();

  private:
    size_t index_;
};

void* dynamic_shared();

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);
cudaError_t allow_shared(const void* kernel, int bytes);

// What PyTorch's current stream and device guard are here; a launch without them is a fault.
cudaStream_t current_stream();
void enter_device();
void leave_device();

template <typename T>
T shuffle(T value, unsigned from, unsigned mask, Place place) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(bits, from, mask, place);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace cuda_on_cpu

// One object for each declaration (and each instantiation of the template that it stands in).
#define CDM_SHARED_ARRAY(type, name, count)                               \
    static cuda_on_cpu::SharedArray name##_array(sizeof(type) * (count)); \
    type* const name = static_cast<type*>(name##_array.of_this_block())
#define CDM_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_on_cpu::dynamic_shared())

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
    return cuda_on_cpu::launch(*config, reinterpret_cast<const void*>(kernel),
                               [&] { std::apply(kernel, copies); });
}

template <typename Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute, int value) {
    return cuda_on_cpu::allow_shared(reinterpret_cast<const void*>(kernel), value);
}

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    cuda_on_cpu::wait_for_block({file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned from = lane + delta < 32 ? threadIdx.x + delta : threadIdx.x;
    return cuda_on_cpu::shuffle(value, from, mask, {file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lane_mask, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
    return cuda_on_cpu::shuffle(value, threadIdx.x ^ lane_mask, mask, {file, line});
}

using std::max;
using std::min;
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
