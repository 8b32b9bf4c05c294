// GroupNorm + SiLU: the arguments of the kernels, and the arithmetic that CPU and CUDA share. The formulas
// are derived in docs/explanation/group_norm_silu.md; cdm_fast/ops/group_norm_silu.py is the specification.
#ifndef CDM_GROUP_NORM_SILU_H
#define CDM_GROUP_NORM_SILU_H

#include <cstdint>

namespace cdm {

// An image tensor whose channels lie in one piece or in two, as those of a concatenation do.
struct Pieces {
    void* at[2];
};

// One of the two: the channels [begin, end) of the whole.
struct Piece {
    int64_t index, begin, end;
    constexpr int64_t channels() const { return end - begin; }
};

// Tensors and sizes of one call. Images are (batch, channels, pixels), or (batch, pixels, channels) when
// channels_last; parameters, statistics and their gradients are in the precision of the statistics.
struct GroupNormSilu {
    Pieces x;
    const void* g;       // cotangent of y; not in the forward pass
    Pieces v;            // cotangent of the VJP's result; only in the derivative of the VJP
    const void* weight;  // (channels) or (batch, channels)
    const void* bias;
    void* mean;  // (batch, groups)
    void* rstd;
    void* y;            // only in the forward pass
    Pieces grad_x;      // of the VJP, or of its derivative
    void* grad_g;       // like g; only in the derivative of the VJP
    void* grad_weight;  // (batch, channels), or null: not wanted
    void* grad_bias;
    const int64_t* seed;  // (seed, offset, number of the first image), or null: no dropout
    int64_t batch, channels, pixels, groups;
    int64_t split;             // channels of the first piece of x, v and grad_x: all, if there is no second
    int64_t parameter_stride;  // from one image's weight to the next: 0 or channels
    double eps;
    uint32_t drop_threshold;
    double keep_scale;  // 1 / (1 - dropout)
    bool channels_last, silu;

    constexpr Piece piece_of(int64_t channel) const {
        return channel < split ? Piece{0, 0, split} : Piece{1, split, channels};
    }
};

// Groups of one image, as a range of channels.
struct GroupRange {
    int64_t image, begin, end;
    constexpr int64_t channels() const { return end - begin; }
};

// Scratch memory of a range on the CPU: rows of per-channel numbers, which vectors read a little beyond.
constexpr int64_t kNumRows = 10, kRowPadding = 16;

}  // namespace cdm

#endif  // CDM_GROUP_NORM_SILU_H

// From here on once per instruction set, and once in the CUDA file, with CDM_ISA and CDM_SHARED defined: the
// vector code of an instruction set must be compiled inside its region.
#ifdef CDM_ISA
namespace CDM_ISA {

// First and second derivative of silu(u) = u sigmoid(u).
template <class V>
CDM_SHARED V silu_first(V u, V sigmoid_u) {
    return sigmoid_u + u * (sigmoid_u * (1 - sigmoid_u));
}

template <class V>
CDM_SHARED V silu_second(V u, V sigmoid_u) {
    return sigmoid_u * (1 - sigmoid_u) * (2 + u * (1 - 2 * sigmoid_u));
}

// Sums over the pixels of one channel, with s1 = g mask silu'(u) and s2 = g mask silu''(u). The VJP needs
// the first two, its derivative all; without silu s2 is 0.
enum ChannelSum { kS1, kS1X, kV, kVX, kVS1, kS2, kS2X, kS2XX, kVS2, kVS2X, kNumSums };
constexpr int kNumVjpSums = 2, kNumPlainSums = kS2;

// The sums of the channels of one group, and the weights of these channels.
template <class S, class Weight>
struct GroupSums {
    const S* sums;  // a row for each ChannelSum; starts at the first channel of the group
    int64_t row_length;
    const Weight* weight;
    int64_t channels;
    S size;  // elements of the group: channels times pixels

    CDM_SHARED S at(int which, int64_t channel) const { return sums[which * row_length + channel]; }

    CDM_SHARED S mean(int which) const {
        S total = 0;
        for (int64_t i = 0; i < channels; ++i) total += at(which, i);
        return total / size;
    }

    CDM_SHARED S weighted_mean(int which) const {
        S total = 0;
        for (int64_t i = 0; i < channels; ++i) total += weight[i] * at(which, i);
        return total / size;
    }
};

// Means over a group, of p = weight s1, of v, and of products with xhat.
template <class S>
struct GroupMeans {
    S p, px, v, vx, v_p;
};

// What the last pass of the VJP's derivative subtracts: grad_x = rstd (grad_xhat - constant - xhat slope).
template <class S>
struct GradXhat {
    S constant, slope;
};

// Derivatives of <v, VJP> with respect to a channel's bias and, in two parts, its weight: through u, and
// through the factor weight in p.
template <class S>
struct ChannelGrads {
    S bias, weight_through_u, weight_direct;
};

template <class S>
CDM_SHARED ChannelGrads<S> channel_grads(const S* sum, S weight, S rstd, const GroupMeans<S>& mean) {
    const S scale = weight * rstd;
    return {scale * (sum[kVS2] - mean.v * sum[kS2] - mean.vx * sum[kS2X]),
            scale * (sum[kVS2X] - mean.v * sum[kS2X] - mean.vx * sum[kS2XX]),
            rstd * (sum[kVS1] - mean.v * sum[kS1] - mean.vx * sum[kS1X])};
}

// mean_t, mean_tx: group means of weight times channel_grads' bias and weight_through_u.
template <class S>
CDM_SHARED GradXhat<S> grad_xhat_means(S mean_t, S mean_tx, S rstd, const GroupMeans<S>& mean) {
    // <v, VJP> / n, whose derivative through rstd is -rstd xhat times it.
    const S value = rstd * (mean.v_p - mean.p * mean.v - mean.px * mean.vx);
    return {mean_t - rstd * (mean.px * mean.v + mean.vx * mean.p),
            mean_tx - 2 * rstd * mean.px * mean.vx + value};
}

// What the last pass of the VJP's derivative needs to know of a group.
template <class S>
struct FinishedGroup {
    GroupMeans<S> mean;
    GradXhat<S> grad_xhat;
};

// Finishes the VJP's derivative for a group whose sums are complete: calls store(channel of the group,
// gradient of its weight, gradient of its bias) for each of its channels.
template <class S, class Weight, class Store>
CDM_SHARED FinishedGroup<S> finish_group(const GroupSums<S, Weight>& group, S rstd, const Store& store) {
    const GroupMeans<S> mean = {group.weighted_mean(kS1), group.weighted_mean(kS1X), group.mean(kV),
                                group.mean(kVX), group.weighted_mean(kVS1)};
    S mean_t = 0, mean_tx = 0;
    for (int64_t i = 0; i < group.channels; ++i) {
        S sum[kNumSums];
        for (int which = 0; which < kNumSums; ++which) sum[which] = group.at(which, i);
        const S weight = group.weight[i];
        const ChannelGrads<S> grads = channel_grads(sum, weight, rstd, mean);
        mean_t += weight * grads.bias / group.size;
        mean_tx += weight * grads.weight_through_u / group.size;
        store(i, grads.weight_through_u + grads.weight_direct, grads.bias);
    }
    return {mean, grad_xhat_means(mean_t, mean_tx, rstd, mean)};
}

}  // namespace CDM_ISA
#endif
