// The part of torch's C interface that only a CUDA build of it has, or that wants a device. The library that
// this is linked into takes these functions instead of torch's (-Bsymbolic).
#define USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cuda_runtime.h"

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
    cuda_on_cpu::enter_device();
    *guard = reinterpret_cast<DeviceGuardHandle>(cuda_on_cpu::current_stream());  // any pointer but null
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
    cuda_on_cpu::leave_device();
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = cuda_on_cpu::current_stream();
    return AOTI_TORCH_SUCCESS;
}
