// CPU kernels of `group_norm_silu`, compiled once per instruction set (for_each_isa.h).
//
// A work item is a range of groups of one image, small enough to stay in the cache between its passes.
// Vectors lie along the pixels (images stored channel by channel) or across the channels (channels-last). The
// layouts differ in how a vector is addressed and combined with per-channel numbers; all else is common code.

#include "vec_body.h"

#define CDM_SHARED CDM_INLINE
#include "group_norm_silu.h"
#undef CDM_SHARED

namespace CDM_ISA {

using cdm::GroupNormSilu;
using cdm::GroupRange;
using cdm::Piece;
using cdm::Pieces;

// `count` vectors at offset, offset + step, ... of a tensor: pixels of one channel, or of a tile of channels.
// All channels of a run lie in one piece of the tensors that may have two.
struct Run {
    int64_t count;
    int64_t offset, step;
    int64_t piece, piece_offset, piece_step;  // the same in that piece
    int64_t within, within_step;  // the same in the item's own arrays: the dropout mask, and what is kept
    int64_t channel;              // the first one, counted from the item's first
    int lanes;                    // of each vector that hold data
};

// Runs are at most this long: the partial sums of a run are kept in the precision of the statistics.
constexpr int64_t kRunLength = 64;

// How the vectors of a run are read and written: whole, or only their first lanes. `kept` is 0 in
// the lanes that hold no data.
struct Whole {
    template <class T>
    static CDM_INLINE int lanes(const Run&) {
        return lanes_of<T>();
    }
    template <class T>
    static CDM_INLINE typename Math<T>::Vec kept(typename Math<T>::Vec v, int) {
        return v;
    }
    template <class T>
    static CDM_INLINE typename Math<T>::Vec read(const T* p, int) {
        return load(p);
    }
    template <class T>
    static CDM_INLINE void write(T* p, typename Math<T>::Vec v, int) {
        store(p, v);
    }
};

struct Part {
    template <class T>
    static CDM_INLINE int lanes(const Run& run) {
        return run.lanes;
    }
    template <class T>
    static CDM_INLINE typename Math<T>::Vec kept(typename Math<T>::Vec v, int lanes) {
        return first_lanes<T>(v, lanes);
    }
    template <class T>
    static CDM_INLINE typename Math<T>::Vec read(const T* p, int lanes) {
        return load_some(p, lanes);
    }
    template <class T>
    static CDM_INLINE void write(T* p, typename Math<T>::Vec v, int lanes) {
        store_some(p, v, lanes);
    }
};

// (channels, pixels): a run lies in one channel.
template <class T>
struct ChannelsFirst {
    using Scalar = typename Math<T>::Scalar;
    using Vec = typename Math<T>::Vec;

    template <class F>
    static CDM_INLINE void for_each_run(const GroupNormSilu& a, const GroupRange& item, F f) {
        for (int64_t channel = 0; channel < item.channels(); ++channel) for_each_run_of(channel, a, item, f);
    }

    template <class F>
    static CDM_INLINE void for_each_run_of(int64_t channel, const GroupNormSilu& a, const GroupRange& item,
                                           F f) {
        constexpr int lanes = lanes_of<T>();
        const int64_t filled = a.pixels / lanes;
        const int rest = int(a.pixels % lanes);
        const Piece piece = a.piece_of(item.begin + channel);
        const int64_t of_piece = item.image * piece.channels() + item.begin + channel - piece.begin;
        const auto run = [&](int64_t count, int64_t first, int lanes_filled) {
            const int64_t pixel = first * lanes;
            return Run{count,
                       (item.image * a.channels + item.begin + channel) * a.pixels + pixel,
                       lanes,
                       piece.index,
                       of_piece * a.pixels + pixel,
                       lanes,
                       channel * a.pixels + pixel,
                       lanes,
                       channel,
                       lanes_filled};
        };
        for (int64_t first = 0; first < filled; first += kRunLength)
            f(run(filled - first < kRunLength ? filled - first : kRunLength, first, lanes), Whole{});
        if (rest) f(run(1, filled, rest), Part{});
    }

    // Summing the lanes of one short channel takes as long as reading it, so that is done for as many
    // channels together as a vector has lanes. Sums of long channels are added run by run, in fp64.
    template <int num_sums, class F>
    static CDM_INLINE void reduce(const GroupNormSilu& a, const GroupRange& item, double* sums,
                                  int64_t row_length, F accumulate) {
        constexpr int lanes = lanes_of<T>();
        const bool is_short = a.pixels <= kRunLength * lanes;
        Vec collected[num_sums][lanes] = {};
        for (int64_t first = 0; first < item.channels(); first += lanes) {
            const int count = int(item.channels() - first < lanes ? item.channels() - first : lanes);
            for (int slot = 0; slot < count; ++slot) {
                for_each_run_of(first + slot, a, item,
                                [&](const Run& run, auto access) __attribute__((always_inline)) {
                                    Vec partial[num_sums] = {};
                                    accumulate(run, access, partial);
                                    const bool is_first = run.within == run.channel * a.pixels;
#pragma GCC unroll 16
                                    for (int i = 0; i < num_sums; ++i) {
                                        const Vec kept = access.template kept<T>(partial[i], run.lanes);
                                        if (is_short)
                                            collected[i][slot] = is_first ? kept : collected[i][slot] + kept;
                                        else
                                            sums[i * row_length + run.channel] += sum_lanes<T>(kept, lanes);
                                    }
                                });
            }
            for (int i = 0; is_short && i < num_sums; ++i) {
                Scalar each[lanes];
                store(each, sum_lanes_of_each<T>(collected[i]));
                for (int slot = 0; slot < count; ++slot) sums[i * row_length + first + slot] = each[slot];
            }
        }
    }

    static CDM_INLINE Vec per_channel(const Scalar* values, const Run& run) {
        return broadcast<Vec>(values[run.channel]);
    }
};

// (pixels, channels): a run goes through the pixels of as many channels as a vector has lanes.
template <class T>
struct ChannelsLast {
    using Scalar = typename Math<T>::Scalar;
    using Vec = typename Math<T>::Vec;

    template <class F>
    static CDM_INLINE void for_each_run(const GroupNormSilu& a, const GroupRange& item, F f) {
        constexpr int lanes = lanes_of<T>();
        for (int64_t pixel = 0; pixel < a.pixels; pixel += kRunLength) {
            for (int64_t channel = item.begin; channel < item.end;) {
                const Piece piece = a.piece_of(channel);
                const int64_t end = item.end < piece.end ? item.end : piece.end;
                for (; channel + lanes <= end; channel += lanes)
                    f(run_at(a, item, piece, pixel, channel, lanes), Whole{});
                if (channel < end) f(run_at(a, item, piece, pixel, channel, int(end - channel)), Part{});
                channel = end;
            }
        }
    }

    static CDM_INLINE Run run_at(const GroupNormSilu& a, const GroupRange& item, const Piece& piece,
                                 int64_t pixel, int64_t channel, int lanes) {
        const int64_t at = item.image * a.pixels + pixel, width = item.channels();
        return Run{a.pixels - pixel < kRunLength ? a.pixels - pixel : kRunLength,
                   at * a.channels + channel,
                   a.channels,
                   piece.index,
                   at * piece.channels() + channel - piece.begin,
                   piece.channels(),
                   pixel * width + channel - item.begin,
                   width,
                   channel - item.begin,
                   lanes};
    }

    static CDM_INLINE Vec per_channel(const Scalar* values, const Run& run) {
        return load(values + run.channel);
    }

    template <int num_sums, class F>
    static CDM_INLINE void reduce(const GroupNormSilu& a, const GroupRange& item, double* sums,
                                  int64_t row_length, F accumulate) {
        for_each_run(a, item, [&](const Run& run, auto access) __attribute__((always_inline)) {
            Vec partial[num_sums] = {};
            accumulate(run, access, partial);
#pragma GCC unroll 16
            for (int i = 0; i < num_sums; ++i) {
                Scalar part[lanes_of<T>()];
                store(part, partial[i]);
                double* sum = sums + i * row_length + run.channel;
                for (int lane = 0; lane < access.template lanes<T>(run); ++lane) sum[lane] += part[lane];
            }
        });
    }
};

// Fills the item's dropout mask, 1 = kept, in the order of its data. Element i of the channels-last order
// takes word i % 4 of block i / 4 of the DROPOUT stream (cdm_fast/ops/philox.py).
static void draw_mask(const GroupNormSilu& a, const GroupRange& item, uint8_t* mask) {
    const cdm::PhiloxKey key = cdm::philox_key(a.seed[0], a.seed[1]);
    const uint32_t threshold = a.drop_threshold;
    const int64_t width = item.channels(), image = a.seed[2] + item.image;
    const int64_t first = image * a.pixels * a.channels + item.begin;
    const int64_t pixel_step = a.channels_last ? width : 1, channel_step = a.channels_last ? 1 : a.pixels;
    if (a.channels % 4 || item.begin % 4 || width % 4) {
        for (int64_t pixel = 0; pixel < a.pixels; ++pixel)
            for (int64_t channel = 0; channel < width; ++channel) {
                const int64_t index = first + pixel * a.channels + channel;
                const cdm::Philox4 words = cdm::philox_block(key, cdm::kDropout, uint32_t(index / 4));
                mask[pixel * pixel_step + channel * channel_step] =
                    cdm::philox_word(words, int(index % 4)) >= threshold;
            }
        return;
    }
    for (int64_t channel = 0; channel < width; channel += 4) {
        uint8_t* out = mask + channel * channel_step;
        const uint32_t block = uint32_t((first + channel) / 4), block_step = uint32_t(a.channels / 4);
#pragma omp simd
        for (int32_t pixel = 0; pixel < int32_t(a.pixels); ++pixel) {
            const cdm::Philox4 words =
                cdm::philox_block(key, cdm::kDropout, block + uint32_t(pixel) * block_step);
            out[pixel * pixel_step] = words.x >= threshold;
            out[pixel * pixel_step + channel_step] = words.y >= threshold;
            out[pixel * pixel_step + 2 * channel_step] = words.z >= threshold;
            out[pixel * pixel_step + 3 * channel_step] = words.w >= threshold;
        }
    }
}

// One work item of any of the three kernels: where its data are, and its scratch memory.
template <class T, class Layout, bool silu>
struct Worker {
    using Scalar = typename Math<T>::Scalar;
    using Vec = typename Math<T>::Vec;

    // Per-channel numbers that the passes read, one row each.
    enum Row { kMean, kRstd, kWeight, kBias, kMeanP, kMeanPX, kMeanV, kMeanVX, kConstant, kSlope };

    const GroupNormSilu& a;
    const GroupRange item;
    const int64_t row_length;
    double* const sums;   // kNumSums rows
    Scalar* const rows;   // cdm::kNumRows rows
    Scalar* const kept;   // per element, from the first pass to the second: g mask silu'(u), or sigmoid(u)
    uint8_t* const mask;  // only with dropout

    Worker(const GroupNormSilu& arguments, const GroupRange& range, char* scratch)
        : a(arguments),
          item(range),
          row_length(range.channels() + cdm::kRowPadding),
          sums(reinterpret_cast<double*>(scratch)),
          rows(reinterpret_cast<Scalar*>(sums + kNumSums * row_length)),
          kept(rows + cdm::kNumRows * row_length),
          mask(reinterpret_cast<uint8_t*>(kept + (arguments.g ? range.channels() * arguments.pixels : 0))) {
        const int64_t parameters = item.image * a.parameter_stride + item.begin;
        for (int64_t channel = 0; channel < item.channels(); ++channel) {
            row(kWeight)[channel] = static_cast<const Scalar*>(a.weight)[parameters + channel];
            row(kBias)[channel] = static_cast<const Scalar*>(a.bias)[parameters + channel];
        }
        if (a.seed) draw_mask(a, item, mask);
    }

    Scalar* row(Row which) const { return rows + which * row_length; }
    double* sum(int which) const { return sums + which * row_length; }
    static const T* start(const void* whole, const Run& run) {
        return static_cast<const T*>(whole) + run.offset;
    }
    static T* start(void* whole, const Run& run) { return static_cast<T*>(whole) + run.offset; }
    static T* start(const Pieces& tensor, const Run& run) {
        return static_cast<T*>(tensor.at[run.piece]) + run.piece_offset;
    }
    int64_t channels_per_group() const { return a.channels / a.groups; }
    double group_size() const { return double(channels_per_group() * a.pixels); }

    CDM_INLINE Vec dropped(Vec value, const Run& run, int64_t i) const {
        if (!a.seed) return value;
        return keep_where(mask + run.within + i * run.within_step, value, Scalar(a.keep_scale));
    }

    // Calls f(first channel of the group within the item, index of the group in mean and rstd).
    template <class F>
    CDM_INLINE void for_each_group(F f) const {
        for (int64_t channel = 0; channel < item.channels(); channel += channels_per_group())
            f(channel, item.image * a.groups + (item.begin + channel) / channels_per_group());
    }

    void fill(Row which, int64_t channel, double value) const {
        for (int64_t i = 0; i < channels_per_group(); ++i) row(which)[channel + i] = Scalar(value);
    }

    void load_statistics() const {
        for_each_group([&](int64_t channel, int64_t group) {
            fill(kMean, channel, static_cast<const Scalar*>(a.mean)[group]);
            fill(kRstd, channel, static_cast<const Scalar*>(a.rstd)[group]);
        });
    }

    // ---- forward ----

    void forward() const {
        compute_statistics();
        Layout::for_each_run(a, item, [&](const Run& run, auto access) __attribute__((always_inline)) {
            const Vec mean = Layout::per_channel(row(kMean), run),
                      rstd = Layout::per_channel(row(kRstd), run);
            const Vec weight = Layout::per_channel(row(kWeight), run),
                      bias = Layout::per_channel(row(kBias), run);
            const Vec scale = weight * rstd;
            const T* x = start(a.x, run);
            T* y = start(a.y, run);
            for (int64_t i = 0; i < run.count; ++i) {
                const Vec u = (access.read(x + i * run.piece_step, run.lanes) - mean) * scale + bias;
                const Vec value = silu ? u * sigmoid<T>(u) : u;
                access.write(y + i * run.step, dropped(value, run, i), run.lanes);
            }
        });
    }

    // Fills the first rows of sums from accumulate(run, access, partial sums of the run).
    template <int num_sums, class F>
    CDM_INLINE void reduce(F accumulate) const {
        for (int64_t i = 0; i < num_sums * row_length; ++i) sums[i] = 0;
        Layout::template reduce<num_sums>(a, item, sums, row_length, accumulate);
    }

    // Mean first, squares around it second: the data are in the cache, and nothing cancels.
    void compute_statistics() const {
        reduce<1>([&](const Run& run, auto access, Vec(&total)[1]) __attribute__((always_inline)) {
            const T* x = start(a.x, run);
            for (int64_t i = 0; i < run.count; ++i)
                total[0] += access.read(x + i * run.piece_step, run.lanes);
        });
        for_each_group([&](int64_t channel, int64_t) { fill(kMean, channel, group_at(channel).mean(0)); });
        reduce<1>([&](const Run& run, auto access, Vec(&total)[1]) __attribute__((always_inline)) {
            const Vec mean = Layout::per_channel(row(kMean), run);
            const T* x = start(a.x, run);
            for (int64_t i = 0; i < run.count; ++i) {
                const Vec centred = access.read(x + i * run.piece_step, run.lanes) - mean;
                total[0] += centred * centred;
            }
        });
        for_each_group([&](int64_t channel, int64_t group) {
            const double rstd = 1 / __builtin_sqrt(group_at(channel).mean(0) + a.eps);
            static_cast<Scalar*>(a.mean)[group] = row(kMean)[channel];
            static_cast<Scalar*>(a.rstd)[group] = Scalar(rstd);
            fill(kRstd, channel, rstd);
        });
    }

    // The sums of the group that begins at this channel.
    GroupSums<double, Scalar> group_at(int64_t channel) const {
        return {sums + channel, row_length, row(kWeight) + channel, channels_per_group(), group_size()};
    }

    // ---- VJP: grad_x, grad_weight, grad_bias from g ----

    void vjp() const {
        load_statistics();
        sum_vjp();
        for_each_group([&](int64_t channel, int64_t) {
            fill(kMeanP, channel, group_at(channel).weighted_mean(kS1));
            fill(kMeanPX, channel, group_at(channel).weighted_mean(kS1X));
        });
        if (a.grad_weight) store_grads();
        Layout::for_each_run(a, item, [&](const Run& run, auto access) __attribute__((always_inline)) {
            const Vec mean = Layout::per_channel(row(kMean), run),
                      rstd = Layout::per_channel(row(kRstd), run);
            const Vec weight = Layout::per_channel(row(kWeight), run);
            const Vec mean_p = Layout::per_channel(row(kMeanP), run),
                      mean_px = Layout::per_channel(row(kMeanPX), run);
            const T* x = start(a.x, run);
            T* grad_x = start(a.grad_x, run);
            for (int64_t i = 0; i < run.count; ++i) {
                const Vec xhat = (access.read(x + i * run.piece_step, run.lanes) - mean) * rstd;
                const Vec p = weight * access.read(kept + run.within + i * run.within_step, run.lanes);
                access.write(grad_x + i * run.piece_step, rstd * (p - mean_p - xhat * mean_px), run.lanes);
            }
        });
    }

    void sum_vjp() const {
        reduce<kNumVjpSums>(
            [&](const Run& run, auto access, Vec(&sum)[kNumVjpSums]) __attribute__((always_inline)) {
                const Vec mean = Layout::per_channel(row(kMean), run),
                          rstd = Layout::per_channel(row(kRstd), run);
                const Vec weight = Layout::per_channel(row(kWeight), run),
                          bias = Layout::per_channel(row(kBias), run);
                const T *x = start(a.x, run), *g = start(a.g, run);
                for (int64_t i = 0; i < run.count; ++i) {
                    const Vec xhat = (access.read(x + i * run.piece_step, run.lanes) - mean) * rstd;
                    const Vec g_kept = dropped(access.read(g + i * run.step, run.lanes), run, i);
                    const Vec u = weight * xhat + bias,
                              s1 = silu ? g_kept * silu_first(u, sigmoid<T>(u)) : g_kept;
                    access.write(kept + run.within + i * run.within_step, s1, run.lanes);
                    sum[kS1] += s1;
                    sum[kS1X] += s1 * xhat;
                }
            });
    }

    void store_grads() const {
        const int64_t first = item.image * a.channels + item.begin;
        for (int64_t channel = 0; channel < item.channels(); ++channel) {
            static_cast<Scalar*>(a.grad_weight)[first + channel] = Scalar(sum(kS1X)[channel]);
            static_cast<Scalar*>(a.grad_bias)[first + channel] = Scalar(sum(kS1)[channel]);
        }
    }

    // ---- derivative of the VJP: grad_g, grad_x, grad_weight, grad_bias from v ----

    void vjp_backward() const {
        load_statistics();
        sum_vjp_backward();
        for_each_group([&](int64_t channel, int64_t) { finish_group_at(channel); });
        Layout::for_each_run(a, item, [&](const Run& run, auto access) __attribute__((always_inline)) {
            const Vec mean = Layout::per_channel(row(kMean), run),
                      rstd = Layout::per_channel(row(kRstd), run);
            const Vec weight = Layout::per_channel(row(kWeight), run),
                      bias = Layout::per_channel(row(kBias), run);
            const Vec mean_v = Layout::per_channel(row(kMeanV), run),
                      mean_vx = Layout::per_channel(row(kMeanVX), run);
            const Vec mean_px = Layout::per_channel(row(kMeanPX), run);
            const Vec constant = Layout::per_channel(row(kConstant), run),
                      slope = Layout::per_channel(row(kSlope), run);
            const T *x = start(a.x, run), *g = start(a.g, run), *v = start(a.v, run);
            T *grad_x = start(a.grad_x, run), *grad_g = start(a.grad_g, run);
            for (int64_t i = 0; i < run.count; ++i) {
                const int64_t at = i * run.step, piece_at = i * run.piece_step;
                const Vec xhat = (access.read(x + piece_at, run.lanes) - mean) * rstd;
                const Vec upstream = access.read(v + piece_at, run.lanes);
                const Vec q_weight = rstd * weight * (upstream - mean_v - xhat * mean_vx);
                const Vec g_kept = dropped(access.read(g + at, run.lanes), run, i);
                Vec first = broadcast<Vec>(Scalar(1)), grad_xhat = {};
                if (silu) {
                    const Vec u = weight * xhat + bias;
                    const Vec sigmoid_u = access.read(kept + run.within + i * run.within_step, run.lanes);
                    first = silu_first(u, sigmoid_u);
                    grad_xhat = q_weight * weight * g_kept * silu_second(u, sigmoid_u);
                }
                grad_xhat -= rstd * (upstream * mean_px + weight * g_kept * first * mean_vx);
                access.write(grad_g + at, dropped(q_weight * first, run, i), run.lanes);
                access.write(grad_x + piece_at, rstd * (grad_xhat - constant - xhat * slope), run.lanes);
            }
        });
    }

    void sum_vjp_backward() const {
        constexpr int num_sums = silu ? kNumSums : kNumPlainSums;
        reduce<num_sums>(
            [&](const Run& run, auto access, Vec(&sum)[num_sums]) __attribute__((always_inline)) {
                const Vec mean = Layout::per_channel(row(kMean), run),
                          rstd = Layout::per_channel(row(kRstd), run);
                const Vec weight = Layout::per_channel(row(kWeight), run),
                          bias = Layout::per_channel(row(kBias), run);
                const T *x = start(a.x, run), *g = start(a.g, run), *v = start(a.v, run);
                for (int64_t i = 0; i < run.count; ++i) {
                    const Vec xhat = (access.read(x + i * run.piece_step, run.lanes) - mean) * rstd;
                    const Vec upstream = access.read(v + i * run.piece_step, run.lanes);
                    const Vec g_kept = dropped(access.read(g + i * run.step, run.lanes), run, i);
                    Vec s1 = g_kept;
                    if constexpr (silu) {
                        const Vec u = weight * xhat + bias, sigmoid_u = sigmoid<T>(u);
                        access.write(kept + run.within + i * run.within_step, sigmoid_u, run.lanes);
                        const Vec s2 = g_kept * silu_second(u, sigmoid_u), s2x = s2 * xhat;
                        s1 *= silu_first(u, sigmoid_u);
                        sum[kS2] += s2;
                        sum[kS2X] += s2x;
                        sum[kS2XX] += s2x * xhat;
                        sum[kVS2] += upstream * s2;
                        sum[kVS2X] += upstream * s2x;
                    }
                    sum[kS1] += s1;
                    sum[kS1X] += s1 * xhat;
                    sum[kV] += upstream;
                    sum[kVX] += upstream * xhat;
                    sum[kVS1] += upstream * s1;
                }
            });
        for (int64_t i = num_sums * row_length; i < kNumSums * row_length; ++i) sums[i] = 0;
    }

    // Stores the gradients of the parameters of a group, and what the last pass needs to know of it.
    void finish_group_at(int64_t channel) const {
        const int64_t first = item.image * a.channels + item.begin + channel;
        const auto store_grads = [&](int64_t i, double grad_weight, double grad_bias) {
            static_cast<Scalar*>(a.grad_weight)[first + i] = Scalar(grad_weight);
            static_cast<Scalar*>(a.grad_bias)[first + i] = Scalar(grad_bias);
        };
        const FinishedGroup<double> group =
            finish_group(group_at(channel), double(row(kRstd)[channel]), store_grads);
        fill(kMeanPX, channel, group.mean.px);
        fill(kMeanV, channel, group.mean.v);
        fill(kMeanVX, channel, group.mean.vx);
        fill(kConstant, channel, group.grad_xhat.constant);
        fill(kSlope, channel, group.grad_xhat.slope);
    }
};

template <class T, class Layout, bool silu>
static void run_worker(const GroupNormSilu& a, const GroupRange& item, char* scratch) {
    const Worker<T, Layout, silu> worker(a, item, scratch);
    if (a.v.at[0]) {
        worker.vjp_backward();
    } else if (a.g) {
        worker.vjp();
    } else {
        worker.forward();
    }
}

// The forward pass, the VJP if there is a g, or the VJP's derivative if there is a v, on one range of groups.
template <class T>
static void group_norm_silu_item(const GroupNormSilu& a, const GroupRange& item, char* scratch) {
    if (a.channels_last) {
        if (a.silu) return run_worker<T, ChannelsLast<T>, true>(a, item, scratch);
        return run_worker<T, ChannelsLast<T>, false>(a, item, scratch);
    }
    if (a.silu) return run_worker<T, ChannelsFirst<T>, true>(a, item, scratch);
    return run_worker<T, ChannelsFirst<T>, false>(a, item, scratch);
}

}  // namespace CDM_ISA
