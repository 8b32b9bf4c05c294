// `denoise` on CUDA devices: torch.ops.cdm_fast.{head_cotangent, denoise_epilogue, denoise_x0, denoise_loss}
// and their backward.
#include "cuda_common.cuh"
#include "denoise_op.h"

namespace cdm {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 8;     // per thread and access: 16 bytes of a 16-bit type
constexpr int64_t kTile = 8192;  // elements of an image that one block sums
constexpr int kFeatureThreads = 128;

enum class Kind { eps_hat, x0_hat, loss_backward };

// The arithmetic of one element, with the coefficients of its image.
template <Kind kind>
struct Element {
    float a_t = 1.0f, s_t, factor = 0.0f;

    __device__ __forceinline__ Element(const DenoiseArguments& p, int64_t image) {
        s_t = static_cast<const float*>(p.s_t)[image];
        if (kind == Kind::x0_hat) a_t = static_cast<const float*>(p.a_t)[image];
        if (kind == Kind::loss_backward) factor = 2.0f * s_t * static_cast<const float*>(p.grad_sum)[image];
    }

    __device__ __forceinline__ float operator()(float g, float x, float eps) const {
        if (kind == Kind::eps_hat) return eps_hat(g, x, s_t);
        if (kind == Kind::x0_hat) return x0_hat(g, x, a_t, s_t);
        return factor * (eps_hat(g, x, s_t) - eps);
    }
};

// A thread computes eight elements; `packed`: these lie in one image and are aligned.
template <Kind kind, typename G, typename Out, bool packed>
__global__ void __launch_bounds__(kThreads) elementwise(const DenoiseArguments p) {
    const int64_t size = p.batch * p.image_size;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kElements;
    if (first >= size) return;
    const G* grad_x = static_cast<const G*>(p.grad_x) + first;
    const float* x = static_cast<const float*>(p.x) + first;
    const float* eps = static_cast<const float*>(p.eps) + first;
    Out* out = static_cast<Out*>(p.out) + first;
    if constexpr (packed) {
        const Element<kind> element(p, first / p.image_size);
        const Pack<G, kElements> g_pack = load_pack<kElements>(grad_x);
        const Pack<float, kElements> x_pack = load_pack<kElements>(x);
        Pack<float, kElements> eps_pack{};
        if (kind == Kind::loss_backward) eps_pack = load_pack<kElements>(eps);
        Pack<Out, kElements> out_pack;
#pragma unroll
        for (int i = 0; i < kElements; ++i)
            narrow(element(widen(g_pack.at[i]), x_pack.at[i], eps_pack.at[i]), &out_pack.at[i]);
        store_pack<kElements>(out, out_pack);
    } else {
        for (int i = 0; i < kElements && first + i < size; ++i) {
            const Element<kind> element(p, (first + i) / p.image_size);
            narrow(element(widen(grad_x[i]), x[i], kind == Kind::loss_backward ? eps[i] : 0.0f), out + i);
        }
    }
}

template <Kind kind, typename G, typename Out>
void launch_elementwise(const DenoiseArguments& arguments, cudaStream_t stream) {
    const int64_t size = arguments.batch * arguments.image_size;
    const Launch launch = {"denoise", ceil_div(size, kThreads * kElements), kThreads, stream};
    const bool packed = arguments.image_size % kElements == 0 &&
                        are_aligned({arguments.grad_x, arguments.x, arguments.eps, arguments.out});
    launch_kernel(launch, packed ? elementwise<kind, G, Out, true> : elementwise<kind, G, Out, false>,
                  arguments);
}

// A block writes the squared error of one tile of an image to partial[image * tiles + tile].
template <typename G, bool packed>
__global__ void __launch_bounds__(kThreads)
    loss_tiles(const DenoiseArguments p, float* partial, int64_t tiles) {
    CDM_SHARED_ARRAY(float, shared, 32);
    const int64_t image = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const int64_t start = image * p.image_size;
    const int64_t begin = start + tile * kTile;
    const int64_t end = min(begin + kTile, start + p.image_size);
    const G* grad_x = static_cast<const G*>(p.grad_x);
    const float* x = static_cast<const float*>(p.x);
    const float* eps = static_cast<const float*>(p.eps);
    const float s_t = static_cast<const float*>(p.s_t)[image];
    float sum = 0.0f;
    if constexpr (packed) {
        for (int64_t i = begin + threadIdx.x * kElements; i < end; i += kThreads * kElements) {
            const Pack<G, kElements> g_pack = load_pack<kElements>(grad_x + i);
            const Pack<float, kElements> x_pack = load_pack<kElements>(x + i);
            const Pack<float, kElements> eps_pack = load_pack<kElements>(eps + i);
#pragma unroll
            for (int k = 0; k < kElements; ++k) {
                const float error = eps_hat(widen(g_pack.at[k]), x_pack.at[k], s_t) - eps_pack.at[k];
                sum += error * error;
            }
        }
    } else {
        for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
            const float error = eps_hat(widen(grad_x[i]), x[i], s_t) - eps[i];
            sum += error * error;
        }
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) sum_tiles(const float* partial, int64_t tiles, float* out) {
    CDM_SHARED_ARRAY(float, shared, 32);
    float sum = 0.0f;
    for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads)
        sum += partial[blockIdx.x * tiles + tile];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <typename G>
void launch_loss(const DenoiseArguments& arguments, const Tensor& like, cudaStream_t stream) {
    const int64_t tiles = ceil_div(arguments.image_size, kTile);
    const Launch launch = {"denoise_loss", arguments.batch * tiles, kThreads, stream};
    const bool packed =
        arguments.image_size % kElements == 0 && are_aligned({arguments.grad_x, arguments.x, arguments.eps});
    const Tensor partial = torch::stable::new_empty(like, {arguments.batch * tiles}, ScalarType::Float);
    float* sums = static_cast<float*>(tiles == 1 ? arguments.out : partial.data_ptr());
    launch_kernel(launch, packed ? loss_tiles<G, true> : loss_tiles<G, false>, arguments, sums, tiles);
    if (tiles > 1)
        launch_kernel({"denoise_loss", arguments.batch, kThreads, stream}, sum_tiles, sums, tiles,
                      static_cast<float*>(arguments.out));
}

__host__ __device__ __forceinline__ int64_t feature_tiles(const CotangentArguments& p) {
    return (p.num_features + kFeatureThreads - 1) / kFeatureThreads;
}

// Classes that are added before the rest: the error of a sum in fp32 grows with the number of its terms.
constexpr int64_t kClassesOfPart = 256;

// A block computes a tile of features of one example; consecutive blocks compute the tiles of an example.
template <typename T>
__global__ void __launch_bounds__(kFeatureThreads) cotangent_kernel(const CotangentArguments p) {
    const int64_t tiles = feature_tiles(p), b = blockIdx.x / tiles;
    const int64_t d = blockIdx.x % tiles * kFeatureThreads + threadIdx.x;
    if (d >= p.num_features) return;
    const T* weight = static_cast<const T*>(p.weight);
    const int64_t row = first_row(p, p.level[b]);
    float sum = is_known(p, p.level[b]) ? 0.0f : nanf("");
    if (is_known(p, p.level[b]) && row != p.num_rows - 1) {
        sum = widen(weight[(p.num_rows - 1) * p.num_features + d]);
        for (int64_t first = 0; first < p.num_classes; first += kClassesOfPart) {
            const int64_t end = min(first + kClassesOfPart, p.num_classes);
            float part = 0.0f;
            for (int64_t c = first; c < end; ++c)
                part += class_share<float>(p, b, c) * widen(weight[(row + c) * p.num_features + d]);
            sum -= part;
        }
    }
    narrow(sum, static_cast<T*>(p.out) + b * p.num_features + d);
}

// A block computes a tile of features of one row of the weight. It adds the examples of that row in order.
template <typename T>
__global__ void __launch_bounds__(kFeatureThreads) cotangent_grad_weight_kernel(const CotangentArguments p) {
    const int64_t tiles = feature_tiles(p), row = blockIdx.x / tiles;
    const int64_t d = blockIdx.x % tiles * kFeatureThreads + threadIdx.x;
    if (d >= p.num_features) return;
    const int64_t last = p.num_rows - 1;
    float sum = 0.0f;
    for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t first = first_row(p, p.level[b]);
        if (first == last) continue;
        const bool is_noise = row == last, is_mine = row >= first && row < first + p.num_classes;
        if (!is_noise && !is_mine) continue;
        const float g = widen(static_cast<const T*>(p.grad)[b * p.num_features + d]);
        if (is_noise)
            sum += is_known(p, p.level[b]) ? g : nanf("");
        else
            sum -= class_share<float>(p, b, row - first) * g;
    }
    static_cast<float*>(p.grad_weight)[row * p.num_features + d] = sum;
}

// A block computes one class of one example.
template <typename T>
__global__ void __launch_bounds__(kFeatureThreads) cotangent_grad_class_kernel(const CotangentArguments p) {
    CDM_SHARED_ARRAY(float, shared, 32);
    const int64_t b = blockIdx.x / p.num_classes, c = blockIdx.x % p.num_classes;
    const int64_t row = first_row(p, p.level[b]);
    float sum = is_known(p, p.level[b]) ? 0.0f : nanf("");
    if (is_known(p, p.level[b]) && row != p.num_rows - 1) {
        const T* g = static_cast<const T*>(p.grad) + b * p.num_features;
        const T* of_class = static_cast<const T*>(p.weight) + (row + c) * p.num_features;
        for (int64_t d = threadIdx.x; d < p.num_features; d += kFeatureThreads)
            sum -= widen(g[d]) * widen(of_class[d]);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) static_cast<float*>(p.grad_class_weight)[b * p.num_classes + c] = sum;
}

struct DenoiseOnCuda {
    static void epilogue(const DenoiseArguments& arguments, ScalarType type, const Tensor& like) {
        elementwise_to_float<Kind::eps_hat>(arguments, type, like);
    }

    static void x0(const DenoiseArguments& arguments, ScalarType type, const Tensor& like) {
        elementwise_to_float<Kind::x0_hat>(arguments, type, like);
    }

    static void loss(const DenoiseArguments& arguments, ScalarType type, const Tensor& like) {
        const torch::stable::accelerator::DeviceGuard guard(like.get_device());
        with_float_type(type, [&](auto g) { launch_loss<decltype(g)>(arguments, like, stream_of(like)); });
    }

    static void loss_backward(const DenoiseArguments& arguments, ScalarType type, const Tensor& like) {
        const torch::stable::accelerator::DeviceGuard guard(like.get_device());
        with_float_type(type, [&](auto g) {
            launch_elementwise<Kind::loss_backward, decltype(g), decltype(g)>(arguments, stream_of(like));
        });
    }

    static void cotangent(const CotangentArguments& arguments, ScalarType type, const Tensor& like) {
        const torch::stable::accelerator::DeviceGuard guard(like.get_device());
        const int64_t blocks = arguments.batch * feature_tiles(arguments);
        const Launch launch = {"head_cotangent", blocks, kFeatureThreads, stream_of(like)};
        with_float_type(type,
                        [&](auto t) { launch_kernel(launch, cotangent_kernel<decltype(t)>, arguments); });
    }

    static void cotangent_backward(const CotangentArguments& arguments, ScalarType type, const Tensor& like) {
        const torch::stable::accelerator::DeviceGuard guard(like.get_device());
        const char* op = "head_cotangent_backward";
        const cudaStream_t stream = stream_of(like);
        const int64_t of_weight = arguments.num_rows * feature_tiles(arguments);
        const int64_t of_classes = arguments.batch * arguments.num_classes;
        with_float_type(type, [&](auto t) {
            using T = decltype(t);
            launch_kernel({op, of_weight, kFeatureThreads, stream}, cotangent_grad_weight_kernel<T>,
                          arguments);
            if (arguments.grad_class_weight != nullptr)
                launch_kernel({op, of_classes, kFeatureThreads, stream}, cotangent_grad_class_kernel<T>,
                              arguments);
        });
    }

  private:
    template <Kind kind>
    static void elementwise_to_float(const DenoiseArguments& arguments, ScalarType type, const Tensor& like) {
        const torch::stable::accelerator::DeviceGuard guard(like.get_device());
        with_float_type(
            type, [&](auto g) { launch_elementwise<kind, decltype(g), float>(arguments, stream_of(like)); });
    }
};

}  // namespace
}  // namespace cdm

CDM_IMPLEMENT_DENOISE(CUDA, cdm::DenoiseOnCuda)
