// `noising` on CUDA devices: torch.ops.cdm_fast.noising. A thread computes eight elements from two Philox
// blocks.
#include "cuda_common.cuh"
#include "noising_op.h"

namespace cdm {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 8;

__device__ __forceinline__ void draw_normals(const PhiloxKey& key, int64_t first, float* out) {
#pragma unroll
    for (int half = 0; half < kElements / 4; ++half) {
        const Philox4 words = philox_block(key, kNoise, static_cast<uint32_t>(first / 4 + half));
        const NormalPair low = box_muller(words.x, words.y), high = box_muller(words.z, words.w);
        out[4 * half] = low.x;
        out[4 * half + 1] = low.y;
        out[4 * half + 2] = high.x;
        out[4 * half + 3] = high.y;
    }
}

__device__ __forceinline__ void draw_uniforms(const PhiloxKey& key, int64_t first, float* out) {
#pragma unroll
    for (int half = 0; half < kElements / 4; ++half) {
        const Philox4 words = philox_block(key, kDequantisation, static_cast<uint32_t>(first / 4 + half));
        out[4 * half] = uniform_of(words.x);
        out[4 * half + 1] = uniform_of(words.y);
        out[4 * half + 2] = uniform_of(words.z);
        out[4 * half + 3] = uniform_of(words.w);
    }
}

struct Coefficients {
    float a_t, s_t;
};

__device__ __forceinline__ Coefficients coefficients(const NoisingArguments& p, int64_t image) {
    const int64_t level = p.level[image];
    if (level < 0 || level >= p.num_levels) return {nanf(""), nanf("")};
    return {static_cast<const float*>(p.a)[level], static_cast<const float*>(p.s)[level]};
}

// Index of the element that a mirrored image has in the place of `index`.
__device__ __forceinline__ int64_t mirror(int64_t index, int64_t row) {
    const int64_t column = index % row;
    return index + (row - 1 - 2 * column);
}

// Eight elements of one image, whose size is a multiple of eight.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) noising_packed(const NoisingArguments p) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kElements;
    if (first >= p.size) return;
    const int64_t image = first / p.image_size;
    const PhiloxKey key = p.seed == nullptr ? PhiloxKey{} : philox_key(p.seed[0], p.seed[1]);

    float clean[kElements], drawn[kElements];
    const In* x0 = static_cast<const In*>(p.x0);
    const bool mirrored = p.flip && philox_flip(key, image);
    if (mirrored && p.row % kElements == 0) {
        const Pack<In, kElements> pack = load_pack<kElements>(x0 + mirror(first, p.row) - (kElements - 1));
#pragma unroll
        for (int i = 0; i < kElements; ++i) clean[i] = widen(pack.at[kElements - 1 - i]);
    } else if (mirrored) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) clean[i] = widen(x0[mirror(first + i, p.row)]);
    } else {
        const Pack<In, kElements> pack = load_pack<kElements>(x0 + first);
#pragma unroll
        for (int i = 0; i < kElements; ++i) clean[i] = widen(pack.at[i]);
    }
    if (p.scale != 0.0f) {
        draw_uniforms(key, first, drawn);
#pragma unroll
        for (int i = 0; i < kElements; ++i) clean[i] = dequantised(clean[i], drawn[i], p.scale);
    }

    Pack<float, kElements> eps;
    if (p.eps_given != nullptr) {
        eps = load_pack<kElements>(static_cast<const float*>(p.eps_given) + first);
    } else {
        draw_normals(key, first, eps.at);
        store_pack<kElements>(static_cast<float*>(p.eps_drawn) + first, eps);
    }
    const Coefficients c = coefficients(p, image);
    Pack<Out, kElements> x_t;
    Pack<float, kElements> x0_out;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
        x0_out.at[i] = clean[i];
        narrow(noised(c.a_t, clean[i], c.s_t, eps.at[i]), &x_t.at[i]);
    }
    store_pack<kElements>(static_cast<Out*>(p.x_t) + first, x_t);
    if (p.x0_out != nullptr) store_pack<kElements>(static_cast<float*>(p.x0_out) + first, x0_out);
}

// Eight elements that may lie in several images, of any size and layout.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) noising_ragged(const NoisingArguments p) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kElements;
    if (first >= p.size) return;
    const PhiloxKey key = p.seed == nullptr ? PhiloxKey{} : philox_key(p.seed[0], p.seed[1]);
    float normal[kElements], uniform[kElements];
    if (p.eps_given == nullptr) draw_normals(key, first, normal);
    if (p.scale != 0.0f) draw_uniforms(key, first, uniform);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
        const int64_t index = first + i;
        if (index >= p.size) return;
        const int64_t image = index / p.image_size;
        const bool mirrored = p.flip && philox_flip(key, image);
        const int64_t place = memory_offset(p, index);
        const int64_t source = mirrored ? memory_offset(p, mirror(index, p.row)) : place;
        float clean = widen(static_cast<const In*>(p.x0)[source]);
        if (p.scale != 0.0f) clean = dequantised(clean, uniform[i], p.scale);
        float eps = normal[i];
        if (p.eps_given != nullptr)
            eps = static_cast<const float*>(p.eps_given)[place];
        else
            static_cast<float*>(p.eps_drawn)[place] = eps;
        const Coefficients c = coefficients(p, image);
        narrow(noised(c.a_t, clean, c.s_t, eps), static_cast<Out*>(p.x_t) + place);
        if (p.x0_out != nullptr) static_cast<float*>(p.x0_out)[place] = clean;
    }
}

template <typename In, typename Out>
void launch_noising(const NoisingArguments& arguments, cudaStream_t stream) {
    const Launch launch = {"noising", ceil_div(arguments.size, kThreads * kElements), kThreads, stream};
    const bool packed = arguments.channels == 1 && arguments.image_size % kElements == 0 &&
                        are_aligned({arguments.x0, arguments.x_t, arguments.eps_given, arguments.eps_drawn});
    launch_kernel(launch, packed ? noising_packed<In, Out> : noising_ragged<In, Out>, arguments);
}

template <typename In>
void launch_from(const NoisingArguments& arguments, ScalarType out, cudaStream_t stream) {
    with_float_type(out, [&](auto sample) { launch_noising<In, decltype(sample)>(arguments, stream); });
}

std::tuple<Tensor, Tensor, Tensor> noising(const Tensor& x0, const Tensor& level, const Tensor& a,
                                           const Tensor& s, const std::optional<Tensor>& seed,
                                           const std::optional<Tensor>& eps, int64_t num_grey_levels,
                                           bool flip, ScalarType dtype) {
    const torch::stable::accelerator::DeviceGuard guard(x0.get_device());
    const cudaStream_t stream = stream_of(x0);
    const auto launch_all = [&](const NoisingArguments& arguments, ScalarType in, ScalarType out) {
        if (in == ScalarType::Byte) return launch_from<uint8_t>(arguments, out, stream);
        with_float_type(in, [&](auto sample) { launch_from<decltype(sample)>(arguments, out, stream); });
    };
    return noising_op(x0, level, a, s, seed, eps, num_grey_levels, flip, dtype, launch_all);
}

}  // namespace
}  // namespace cdm

STABLE_TORCH_LIBRARY_IMPL(cdm_fast, CUDA, m) { m.impl("noising", TORCH_BOX(&cdm::noising)); }
