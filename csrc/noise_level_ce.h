// The logits that belong to a level and a label, for host and device. cdm_fast/ops/noise_level_ce.py is the
// specification.
#pragma once

#include <cstdint>

#include "philox.h"

namespace cdm {

// One call: pointers to contiguous tensors. "Compute" is float, or double for double logits.
struct LevelCEArguments {
    const void* logits;     // (B, N)
    const int64_t* level;   // (B,)
    const int64_t* label;   // (B,) or null
    void* loss;             // (B,) Compute
    void* log_ratio;        // (B,) Compute
    void* sums;             // (B, 6) Compute: maximum and log of the scaled sum of all, true and noise logits
    const void* grad_loss;  // (B,) Compute or null
    const void* grad_log_ratio;  // (B,) Compute or null
    void* grad_logits;           // (B, N)
    int64_t batch;
    int64_t num_logits;
    int64_t num_levels;
    int64_t num_classes;
};

// Arguments of `level_logits`, which sums over the classes of each level.
struct LevelLogitsArguments {
    const void* logits;  // (B, N)
    void* level_logits;  // (B, L) Compute
    int64_t batch;
    int64_t num_logits;
    int64_t num_levels;
    int64_t num_classes;
};

struct LogitRange {
    int64_t begin, end;
};

// The logits of pure noise: one for joint logits, num_classes of them when every level has that many.
CDM_HD LogitRange noise_logits(const LevelCEArguments& p) {
    return {(p.num_levels - 1) * p.num_classes, p.num_logits};
}

// The logits of a level and label: one with a label, else all of the level. Empty if either is out of range.
CDM_HD LogitRange true_logits(const LevelCEArguments& p, int64_t level, int64_t label) {
    if (level < 0 || level >= p.num_levels || label < -1 || label >= p.num_classes) return {0, 0};
    if (level == p.num_levels - 1) return noise_logits(p);
    const int64_t begin = level * p.num_classes;
    if (label >= 0) return {begin + label, begin + label + 1};
    return {begin, begin + p.num_classes};
}

// The logits of the level and label of example b.
CDM_HD LogitRange true_logits(const LevelCEArguments& p, int64_t b) {
    return true_logits(p, p.level[b], p.label == nullptr ? -1 : p.label[b]);
}

// logsumexp of a range of logits, as a pair so that nothing is lost when the maximum is large.
template <typename Compute>
struct LogSum {
    Compute maximum, log_sum;
};

// log of (sum of one range) / (sum of another).
template <typename Compute>
CDM_HD Compute log_quotient(LogSum<Compute> a, LogSum<Compute> b) {
    return (a.maximum - b.maximum) + (a.log_sum - b.log_sum);
}

}  // namespace cdm
