// One token, or a few, through the attention of a layer whose earlier keys and values are in a cache: turned, written
// and attended to in one pass, since for so few rows it is the number of kernels that takes time.
#include "common.h"

namespace {

constexpr int64_t MOST = 4;  // rows

// Softmax of the scores of q (dim) with the first `keys` rows of k, times the same rows of v; rows are `row` apart.
void attend(const float *q, const float *k, const float *v, int64_t row, int64_t keys, int64_t dim, float scale,
            float *scores, float *y) {
    for (int64_t j = 0; j < keys; ++j) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < dim; ++i) sum += q[i] * k[j * row + i];
        scores[j] = sum * scale;
    }
    softmax_row(scores, keys);
    for (int64_t i = 0; i < dim; ++i) y[i] = 0.0f;
    for (int64_t j = 0; j < keys; ++j) {
        const float weight = scores[j];
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) y[i] += weight * v[j * row + i];
    }
}

}  // namespace

// ---- query (rows, heads dim), key and value (rows, groups dim) of tokens; cosines and sines (batch, n, 1, dim), as
// rotary_forward takes them, with batch n = rows; keys and values of the cache (batch capacity, groups dim), which are
// written to; slots (rows) int32, where each token goes, which sees those of its sample up to its own; heads and groups
// int32 (2); scale (1): (rows, heads dim)
KERNEL cached_attention(ARGUMENTS) {
    CALL;
    if (!call.are("fffffffiiff") || call.ndims[3] != 4 || call.size(8) != 2 || call.size(9) != 1) return 1;
    const int32_t *slots = static_cast<const int32_t *>(params[7]), *counts = static_cast<const int32_t *>(params[8]);
    const int64_t rows = call.rows(0), dim = call.columns(3), heads = counts[0], groups = counts[1];
    const int64_t batch = shapes[3][0], width = groups * dim, half = dim / 2;
    if (rows < 1 || rows > MOST || dim % 2 || heads < 1 || groups < 1 || heads % groups || rows % batch) return 1;
    if (call.columns(0) != heads * dim || call.size(1) != rows * width || call.size(2) != rows * width) return 1;
    if (call.size(3) != rows * dim || call.size(4) != rows * dim || call.size(7) != rows) return 1;
    if (call.columns(5) != width || call.rows(5) % batch || call.size(6) != call.size(5)) return 1;
    if (call.size(10) != call.size(0)) return 1;
    const int64_t capacity = call.rows(5) / batch, each = heads / groups;
    const float *query = call[0], *cosines = call[3], *sines = call[4];
    const float scale = *call[9];
    float *keys = call[5], *values = call[6], *y = call[10];
    int64_t most = 0;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t slot = slots[row], sample = row / (rows / batch);
        if (slot < sample * capacity || slot >= (sample + 1) * capacity) return 1;
        most = slot - sample * capacity > most ? slot - sample * capacity : most;
        const float *cos = cosines + row * dim, *sin = sines + row * dim;
        for (int64_t group = 0; group < groups; ++group)
            turn(call[1] + row * width + group * dim, cos, sin, sin + half, keys + slot * width + group * dim, half);
        std::memcpy(values + slot * width, call[2] + row * width, width * sizeof(float));
    }
    std::atomic<bool> enough{true};
    each_piece(rows * heads, 2 * (most + 1) * dim, [&](int64_t first, int64_t last) {
        float *turned = scratch.room(dim + capacity);
        if (!turned) enough = false;
        for (int64_t index = first; turned && index < last; ++index) {
            const int64_t row = index / heads, head = index % heads, begin = row / (rows / batch) * capacity;
            const float *cos = cosines + row * dim, *sin = sines + row * dim;
            turn(query + index * dim, cos, sin, sin + half, turned, half);
            const int64_t from = begin * width + head / each * dim;
            attend(turned, keys + from, values + from, width, slots[row] - begin + 1, dim, scale, turned + dim,
                   y + index * dim);
        }
    });
    return enough ? 0 : 1;
}
