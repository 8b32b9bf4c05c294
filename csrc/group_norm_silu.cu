// `group_norm_silu` on CUDA devices: forward, VJP, and the derivative of the VJP, in fp32, bf16 and fp16.
//
// A block takes a range of whole groups of one image. It reads their elements once for the sums of each
// channel and once more, from the cache, for the result. Sums are added in a fixed order.
#include "cuda_common.cuh"
#include "dropout.cuh"
#include "group_norm_silu_op.h"

#define CDM_ISA cuda_device
#define CDM_SHARED __device__ __forceinline__
#include "group_norm_silu.h"

namespace cuda_device {
namespace {

using namespace cdm;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 9;        // per-channel numbers in shared memory
constexpr int kLineBytes = 64;  // filled at least by the channels of a range, if channels-last

// Where a pack lies: in its image, among the range's channels, in channels-last order (for dropout), and in a
// tensor of two pieces.
struct Place {
    int64_t offset;
    int channel;
    int64_t drawn, drawn_step;
    bool in_second;
    int64_t piece_offset;
};

// (channels, pixels): a warp takes a channel.
template <int pack>
struct ChannelsFirst {
    static constexpr int kLanes = 1;  // sums of a thread per quantity

    template <int num_sums, class F>
    static __device__ __forceinline__ void reduce(const GroupNormSilu& a, const GroupRange& range,
                                                  float* sums, int row_length, float*, F accumulate) {
        for (int channel = threadIdx.x / 32; channel < range.channels(); channel += kWarps) {
            float partial[num_sums][kLanes] = {};
            for (int64_t pixel = threadIdx.x % 32 * pack; pixel < a.pixels; pixel += 32 * pack)
                accumulate(place(a, range, channel, pixel), partial);
#pragma unroll
            for (int i = 0; i < num_sums; ++i) {
                const float total = warp_sum(partial[i][0]);
                if (threadIdx.x % 32 == 0) sums[i * row_length + channel] = total;
            }
        }
        __syncthreads();
    }

    template <class F>
    static __device__ __forceinline__ void for_each_pack(const GroupNormSilu& a, const GroupRange& range,
                                                         F f) {
        for (int channel = threadIdx.x / 32; channel < range.channels(); channel += kWarps) {
            for (int64_t pixel = threadIdx.x % 32 * pack; pixel < a.pixels; pixel += 32 * pack)
                f(place(a, range, channel, pixel));
        }
    }

    static __device__ __forceinline__ Pack<float, pack> per_channel(const float* row, int channel) {
        Pack<float, pack> values;
#pragma unroll
        for (int i = 0; i < pack; ++i) values.at[i] = row[channel];
        return values;
    }

  private:
    static __device__ __forceinline__ Place place(const GroupNormSilu& a, const GroupRange& range,
                                                  int channel, int64_t pixel) {
        const int64_t c = range.begin + channel;
        const Piece piece = a.piece_of(c);
        const int64_t of_piece = range.image * piece.channels() + c - piece.begin;
        return {c * a.pixels + pixel, channel,          pixel * a.channels + c,
                a.channels,           piece.index != 0, of_piece * a.pixels + pixel};
    }
};

// (pixels, channels): a thread takes `pack` channels, and pixels at a constant stride.
template <int pack>
struct ChannelsLast {
    static constexpr int kLanes = pack;

    template <int num_sums, class F>
    static __device__ __forceinline__ void reduce(const GroupNormSilu& a, const GroupRange& range,
                                                  float* sums, int row_length, float* buffer, F accumulate) {
        const int columns = range.channels() / pack;
        for (int first = 0; first < columns; first += kThreads) {
            const int width = min(columns - first, kThreads), rows = kThreads / width;
            const int row = threadIdx.x / width, channel = (first + threadIdx.x % width) * pack;
            float partial[num_sums][kLanes] = {};
            if (row < rows)
                for (int64_t pixel = row; pixel < a.pixels; pixel += rows)
                    accumulate(place(a, range, channel, pixel), partial);
#pragma unroll
            for (int i = 0; i < num_sums; ++i) {
#pragma unroll
                for (int lane = 0; lane < pack; ++lane) buffer[threadIdx.x * pack + lane] = partial[i][lane];
                __syncthreads();
                for (int at = threadIdx.x; at < width * pack; at += kThreads) {
                    float total = 0;
                    for (int j = 0; j < rows; ++j) total += buffer[j * width * pack + at];
                    sums[i * row_length + first * pack + at] = total;
                }
                __syncthreads();
            }
        }
    }

    template <class F>
    static __device__ __forceinline__ void for_each_pack(const GroupNormSilu& a, const GroupRange& range,
                                                         F f) {
        const int columns = range.channels() / pack;
        for (int first = 0; first < columns; first += kThreads) {
            const int width = min(columns - first, kThreads), rows = kThreads / width;
            const int row = threadIdx.x / width, channel = (first + threadIdx.x % width) * pack;
            if (row < rows)
                for (int64_t pixel = row; pixel < a.pixels; pixel += rows) f(place(a, range, channel, pixel));
        }
    }

    static __device__ __forceinline__ Pack<float, pack> per_channel(const float* row, int channel) {
        return load_pack<pack>(row + channel);
    }

  private:
    static __device__ __forceinline__ Place place(const GroupNormSilu& a, const GroupRange& range,
                                                  int channel, int64_t pixel) {
        const int64_t c = range.begin + channel, offset = pixel * a.channels + c;
        const Piece piece = a.piece_of(c);
        const int64_t of_piece = (range.image * a.pixels + pixel) * piece.channels() + c - piece.begin;
        return {offset, channel, offset, 1, piece.index != 0, of_piece};
    }
};

template <typename T, class Layout, int pack, bool silu>
struct Worker {
    using Values = Pack<float, pack>;

    enum Row { kMean, kRstd, kWeight, kBias, kMeanP, kMeanPX, kMeanV, kMeanVX, kConstant };
    // The last pass of the VJP's derivative does not need the mean of p.
    static constexpr Row kSlope = kMeanP;

    const GroupNormSilu& a;
    const GroupRange range;
    const int group_channels;
    const int row_length;
    float* const sums;
    float* const rows;
    float* const buffer;

    __device__ Worker(const GroupNormSilu& arguments, const GroupRange& groups, int channels_per_group,
                      int length, float* shared)
        : a(arguments),
          range(groups),
          group_channels(channels_per_group),
          row_length(length),
          sums(shared),
          rows(shared + kNumSums * length),
          buffer(shared + (kNumSums + kRows) * length) {
        const int64_t first = range.image * a.parameter_stride + range.begin;
        for (int channel = threadIdx.x; channel < range.channels(); channel += kThreads) {
            row(kWeight)[channel] = static_cast<const float*>(a.weight)[first + channel];
            row(kBias)[channel] = static_cast<const float*>(a.bias)[first + channel];
        }
    }

    __device__ __forceinline__ float* row(Row which) const { return rows + which * row_length; }
    __device__ __forceinline__ float group_size() const {
        return static_cast<float>(group_channels * a.pixels);
    }
    __device__ __forceinline__ Values per_channel(Row which, int channel) const {
        return Layout::per_channel(row(which), channel);
    }

    __device__ __forceinline__ int64_t in_whole(const Place& at) const {
        return range.image * a.channels * a.pixels + at.offset;
    }

    __device__ __forceinline__ Values load(const void* tensor, const Place& at) const {
        return load_widened<pack>(static_cast<const T*>(tensor) + in_whole(at));
    }

    __device__ __forceinline__ Values load(const Pieces& tensor, const Place& at) const {
        return load_widened<pack>(static_cast<const T*>(of_two(tensor, at)) + at.piece_offset);
    }

    __device__ __forceinline__ void store(void* tensor, const Place& at, const Values& values) const {
        store_narrowed<pack>(static_cast<T*>(tensor) + in_whole(at), values);
    }

    __device__ __forceinline__ void store(const Pieces& tensor, const Place& at, const Values& values) const {
        store_narrowed<pack>(static_cast<T*>(of_two(tensor, at)) + at.piece_offset, values);
    }

    static __device__ __forceinline__ void* of_two(const Pieces& tensor, const Place& at) {
        return at.in_second ? tensor.at[1] : tensor.at[0];
    }

    __device__ __forceinline__ void drop(Values& values, const Place& at) const {
        if (a.seed == nullptr) return;
        const int64_t image = (a.seed[2] + range.image) * a.channels * a.pixels;
        drop_words(a, image + at.drawn, at.drawn_step, values);
    }

    // Calls f(first channel of the group within the range, index of the group in mean and rstd); a thread
    // takes a group.
    template <class F>
    __device__ __forceinline__ void for_each_group(F f) const {
        const int first = threadIdx.x * group_channels, step = kThreads * group_channels;
        for (int channel = first; channel < range.channels(); channel += step)
            f(channel, range.image * a.groups + static_cast<int>(range.begin + channel) / group_channels);
        __syncthreads();
    }

    __device__ __forceinline__ void fill(Row which, int channel, float value) const {
        for (int i = 0; i < group_channels; ++i) row(which)[channel + i] = value;
    }

    // The sums of the group that begins at this channel.
    __device__ __forceinline__ GroupSums<float, float> group_at(int channel) const {
        return {sums + channel, row_length, row(kWeight) + channel, group_channels, group_size()};
    }

    __device__ __forceinline__ void load_statistics() const {
        for_each_group([&](int channel, int64_t group) {
            fill(kMean, channel, static_cast<const float*>(a.mean)[group]);
            fill(kRstd, channel, static_cast<const float*>(a.rstd)[group]);
        });
    }

    __device__ __forceinline__ Values normalised(const Place& at) const {
        const Values x = load(a.x, at), mean = per_channel(kMean, at.channel),
                     rstd = per_channel(kRstd, at.channel);
        Values xhat;
#pragma unroll
        for (int i = 0; i < pack; ++i) xhat.at[i] = (x.at[i] - mean.at[i]) * rstd.at[i];
        return xhat;
    }

    static __device__ __forceinline__ float sigmoid(float u) { return 1.0f / (1.0f + __expf(-u)); }

    // ---- forward ----

    __device__ __forceinline__ void forward() const {
        compute_statistics();
        Layout::for_each_pack(a, range, [&](const Place& at) {
            Values y = normalised(at);
            const Values weight = per_channel(kWeight, at.channel), bias = per_channel(kBias, at.channel);
#pragma unroll
            for (int i = 0; i < pack; ++i) {
                const float u = weight.at[i] * y.at[i] + bias.at[i];
                y.at[i] = silu ? u * sigmoid(u) : u;
            }
            drop(y, at);
            store(a.y, at, y);
        });
    }

    // Mean first, squares around it second, so that nothing cancels.
    __device__ __forceinline__ void compute_statistics() const {
        reduce<1>([&](const Place& at, auto& partial) {
            const Values x = load(a.x, at);
#pragma unroll
            for (int i = 0; i < pack; ++i) partial[0][i % Layout::kLanes] += x.at[i];
        });
        for_each_group([&](int channel, int64_t) { fill(kMean, channel, group_at(channel).mean(0)); });
        reduce<1>([&](const Place& at, auto& partial) {
            const Values x = load(a.x, at), mean = per_channel(kMean, at.channel);
#pragma unroll
            for (int i = 0; i < pack; ++i) {
                const float centred = x.at[i] - mean.at[i];
                partial[0][i % Layout::kLanes] += centred * centred;
            }
        });
        for_each_group([&](int channel, int64_t group) {
            const float rstd = rsqrtf(group_at(channel).mean(0) + static_cast<float>(a.eps));
            static_cast<float*>(a.mean)[group] = row(kMean)[channel];
            static_cast<float*>(a.rstd)[group] = rstd;
            fill(kRstd, channel, rstd);
        });
    }

    template <int num_sums, class F>
    __device__ __forceinline__ void reduce(F accumulate) const {
        Layout::template reduce<num_sums>(a, range, sums, row_length, buffer, accumulate);
    }

    // ---- VJP ----

    // g mask silu'(u), given xhat.
    __device__ __forceinline__ Values cotangent_of_u(const Values& xhat, const Place& at) const {
        Values s1 = load(a.g, at);
        drop(s1, at);
        if (silu) {
            const Values weight = per_channel(kWeight, at.channel), bias = per_channel(kBias, at.channel);
#pragma unroll
            for (int i = 0; i < pack; ++i) {
                const float u = weight.at[i] * xhat.at[i] + bias.at[i];
                s1.at[i] *= silu_first(u, sigmoid(u));
            }
        }
        return s1;
    }

    __device__ __forceinline__ void vjp() const {
        load_statistics();
        reduce<kNumVjpSums>([&](const Place& at, auto& partial) {
            const Values xhat = normalised(at), s1 = cotangent_of_u(xhat, at);
#pragma unroll
            for (int i = 0; i < pack; ++i) {
                partial[kS1][i % Layout::kLanes] += s1.at[i];
                partial[kS1X][i % Layout::kLanes] += s1.at[i] * xhat.at[i];
            }
        });
        for_each_group([&](int channel, int64_t) {
            fill(kMeanP, channel, group_at(channel).weighted_mean(kS1));
            fill(kMeanPX, channel, group_at(channel).weighted_mean(kS1X));
        });
        const int64_t first = range.image * a.channels + range.begin;
        const int channels = a.grad_weight == nullptr ? 0 : static_cast<int>(range.channels());
        for (int channel = threadIdx.x; channel < channels; channel += kThreads) {
            static_cast<float*>(a.grad_bias)[first + channel] = sums[kS1 * row_length + channel];
            static_cast<float*>(a.grad_weight)[first + channel] = sums[kS1X * row_length + channel];
        }
        Layout::for_each_pack(a, range, [&](const Place& at) {
            const Values xhat = normalised(at), rstd = per_channel(kRstd, at.channel);
            const Values weight = per_channel(kWeight, at.channel);
            const Values mean_p = per_channel(kMeanP, at.channel), mean_px = per_channel(kMeanPX, at.channel);
            Values grad_x = cotangent_of_u(xhat, at);
#pragma unroll
            for (int i = 0; i < pack; ++i)
                grad_x.at[i] =
                    rstd.at[i] * (weight.at[i] * grad_x.at[i] - mean_p.at[i] - xhat.at[i] * mean_px.at[i]);
            store(a.grad_x, at, grad_x);
        });
    }

    // ---- derivative of the VJP ----

    __device__ __forceinline__ void vjp_backward() const {
        load_statistics();
        reduce<kNumSums>([&](const Place& at, auto& partial) { add_to_sums(at, partial); });
        for_each_group([&](int channel, int64_t) { finish_group_at(channel); });
        Layout::for_each_pack(a, range, [&](const Place& at) { write_gradients(at); });
    }

    template <class Partial>
    __device__ __forceinline__ void add_to_sums(const Place& at, Partial& partial) const {
        const Values xhat = normalised(at), v = load(a.v, at);
        const Values weight = per_channel(kWeight, at.channel), bias = per_channel(kBias, at.channel);
        Values g = load(a.g, at);
        drop(g, at);
#pragma unroll
        for (int i = 0; i < pack; ++i) {
            const int lane = i % Layout::kLanes;
            const float x = xhat.at[i], upstream = v.at[i];
            float s1 = g.at[i];
            if (silu) {
                const float u = weight.at[i] * x + bias.at[i], sigmoid_u = sigmoid(u);
                const float s2 = s1 * silu_second(u, sigmoid_u);
                s1 *= silu_first(u, sigmoid_u);
                partial[kS2][lane] += s2;
                partial[kS2X][lane] += s2 * x;
                partial[kS2XX][lane] += s2 * x * x;
                partial[kVS2][lane] += upstream * s2;
                partial[kVS2X][lane] += upstream * s2 * x;
            }
            partial[kS1][lane] += s1;
            partial[kS1X][lane] += s1 * x;
            partial[kV][lane] += upstream;
            partial[kVX][lane] += upstream * x;
            partial[kVS1][lane] += upstream * s1;
        }
    }

    // Stores the gradients of the parameters of a group, and what the last pass needs to know of it.
    __device__ __forceinline__ void finish_group_at(int channel) const {
        const int64_t first = range.image * a.channels + range.begin + channel;
        const auto store_grads = [&](int64_t i, float grad_weight, float grad_bias) {
            static_cast<float*>(a.grad_weight)[first + i] = grad_weight;
            static_cast<float*>(a.grad_bias)[first + i] = grad_bias;
        };
        const FinishedGroup<float> group = finish_group(group_at(channel), row(kRstd)[channel], store_grads);
        fill(kMeanPX, channel, group.mean.px);
        fill(kMeanV, channel, group.mean.v);
        fill(kMeanVX, channel, group.mean.vx);
        fill(kConstant, channel, group.grad_xhat.constant);
        fill(kSlope, channel, group.grad_xhat.slope);
    }

    __device__ __forceinline__ void write_gradients(const Place& at) const {
        const Values xhat = normalised(at), v = load(a.v, at);
        const Values weight = per_channel(kWeight, at.channel), bias = per_channel(kBias, at.channel);
        const Values rstd = per_channel(kRstd, at.channel), mean_px = per_channel(kMeanPX, at.channel);
        const Values mean_v = per_channel(kMeanV, at.channel), mean_vx = per_channel(kMeanVX, at.channel);
        const Values constant = per_channel(kConstant, at.channel), slope = per_channel(kSlope, at.channel);
        Values g = load(a.g, at), grad_g, grad_x;
        drop(g, at);
#pragma unroll
        for (int i = 0; i < pack; ++i) {
            const float q_weight =
                rstd.at[i] * weight.at[i] * (v.at[i] - mean_v.at[i] - xhat.at[i] * mean_vx.at[i]);
            float first = 1, grad_xhat = 0;
            if (silu) {
                const float u = weight.at[i] * xhat.at[i] + bias.at[i], sigmoid_u = sigmoid(u);
                first = silu_first(u, sigmoid_u);
                grad_xhat = q_weight * weight.at[i] * g.at[i] * silu_second(u, sigmoid_u);
            }
            grad_xhat -=
                rstd.at[i] * (v.at[i] * mean_px.at[i] + weight.at[i] * g.at[i] * first * mean_vx.at[i]);
            grad_g.at[i] = q_weight * first;
            grad_x.at[i] = rstd.at[i] * (grad_xhat - constant.at[i] - xhat.at[i] * slope.at[i]);
        }
        drop(grad_g, at);
        store(a.grad_g, at, grad_g);
        store(a.grad_x, at, grad_x);
    }
};

// Rows start at multiples of 16 bytes, for the accesses of whole packs.
constexpr int64_t row_length_of(int64_t channels) { return (channels + 7) / 8 * 8; }

enum class Task { forward, vjp, vjp_backward };

template <typename T, class Layout, int pack, bool silu, Task task>
__global__ void __launch_bounds__(kThreads)
    kernel(const GroupNormSilu a, int ranges, int range_groups, int group_channels) {
    CDM_DYNAMIC_SHARED(float, shared);
    const int channels = range_groups * group_channels;
    const int64_t first = static_cast<int64_t>(blockIdx.x % ranges) * channels;
    const GroupRange range{blockIdx.x / ranges, first, min(first + channels, a.channels)};
    const Worker<T, Layout, pack, silu> worker(a, range, group_channels, row_length_of(channels), shared);
    __syncthreads();
    if constexpr (task == Task::forward) worker.forward();
    if constexpr (task == Task::vjp) worker.vjp();
    if constexpr (task == Task::vjp_backward) worker.vjp_backward();
}

template <typename T, class Layout, int pack, bool silu, Task task>
void launch_task(const GroupNormSilu& a, cudaStream_t stream) {
    const int64_t group_channels = a.channels / a.groups;
    const int64_t wanted = a.channels_last ? kLineBytes / static_cast<int64_t>(sizeof(T)) : kWarps;
    // Whole packs in every range: pack divides the number of channels, and pack is a power of two.
    int64_t range_groups = std::min(a.groups, ceil_div(wanted, group_channels));
    while (a.channels_last && range_groups < a.groups && range_groups * group_channels % pack != 0)
        ++range_groups;
    const int64_t row_length = row_length_of(range_groups * group_channels);
    const int64_t bytes = sizeof(float) * (row_length * (kNumSums + kRows) + kThreads * pack);
    const auto function = kernel<T, Layout, pack, silu, task>;
    if (!allow_shared(function, bytes))
        throw std::runtime_error("group_norm_silu: " + std::to_string(group_channels) +
                                 " channels in a group are more than this GPU's shared memory holds; use the "
                                 "triton or the reference backend");
    const int ranges = static_cast<int>(ceil_div(a.groups, range_groups));
    launch_kernel({"group_norm_silu", a.batch * ranges, kThreads, stream, bytes}, function, a, ranges,
                  static_cast<int>(range_groups), static_cast<int>(group_channels));
}

template <typename T, class Layout, int pack, bool silu>
void choose_task(const GroupNormSilu& a, cudaStream_t stream) {
    if (a.v.at[0] != nullptr) return launch_task<T, Layout, pack, silu, Task::vjp_backward>(a, stream);
    if (a.g != nullptr) return launch_task<T, Layout, pack, silu, Task::vjp>(a, stream);
    launch_task<T, Layout, pack, silu, Task::forward>(a, stream);
}

template <typename T, int pack>
void choose_layout(const GroupNormSilu& a, cudaStream_t stream) {
    if (a.channels_last) {
        if (a.silu) return choose_task<T, ChannelsLast<pack>, pack, true>(a, stream);
        return choose_task<T, ChannelsLast<pack>, pack, false>(a, stream);
    }
    if (a.silu) return choose_task<T, ChannelsFirst<pack>, pack, true>(a, stream);
    choose_task<T, ChannelsFirst<pack>, pack, false>(a, stream);
}

}  // namespace

struct GroupNormSiluOnCuda {
    static void run(const GroupNormSilu& a, ScalarType dtype, const Tensor& x) {
        const torch::stable::accelerator::DeviceGuard guard(x.get_device());
        const cudaStream_t stream = stream_of(x);
        with_float_type(dtype, [&](auto element) {
            using T = decltype(element);
            constexpr int pack = 16 / sizeof(T);
            // A pack lies in one channel, or in channels of one piece.
            const bool whole_packs =
                a.channels_last ? a.channels % pack == 0 && a.split % pack == 0 : a.pixels % pack == 0;
            if (whole_packs && are_aligned({a.x.at[0], a.x.at[1], a.g, a.v.at[0], a.v.at[1], a.y,
                                            a.grad_x.at[0], a.grad_x.at[1], a.grad_g}))
                return choose_layout<T, pack>(a, stream);
            choose_layout<T, 1>(a, stream);
        });
    }

    static Tensor sum_over_images(const Tensor& per_image) {
        const int64_t batch = 0;
        return torch::stable::sum(per_image, torch::headeronly::IntHeaderOnlyArrayRef(&batch, 1));
    }
};

}  // namespace cuda_device

CDM_IMPLEMENT_GROUP_NORM_SILU(CUDA, cuda_device::GroupNormSiluOnCuda)
