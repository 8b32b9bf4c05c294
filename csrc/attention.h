// Arguments of the CPU kernels of `attention`, which work in place on rows of score matrices.
// cdm_fast/ops/attention.py is the specification.
#pragma once

#include <cstdint>

namespace cdm {

// One call: contiguous (rows, columns) matrices and one statistic per row. "Compute" is float, or double for
// double matrices.
struct AttentionTile {
    void* scores;      // q k^T; becomes the probabilities
    void* scores_dot;  // u_q k^T + q u_k^T; becomes p_dot
    void* grad_p;      // g v^T; becomes grad_scores
    void* grad_p_dot;  // g u_v^T; becomes grad_scores_dot
    void* lse;         // Compute, (rows,)
    int64_t rows;
    int64_t columns;
    double scale;
};

}  // namespace cdm
