// One token, or a few, through the halves of a layer of LLaMA's: norms, gates and residuals within the products beside
// them, and positions, the write into the cache and the attention to it in one pass. For so few rows it is the number
// of kernels that takes time.
#include "matrix.h"

namespace {

// The RMSNorm of the first parameter with the weight and the epsilon of the next two, in this thread's memory; or null.
const float *normalised(const Call &call) {
    const int64_t rows = call.rows(0), columns = call.columns(0);
    float *y = call.size(2) == 1 ? scratch.room(rows * columns) : nullptr;
    for (int64_t row = 0; y && row < rows; ++row)
        rms_norm(call[0] + row * columns, call[1], *call[2], y + row * columns, columns);
    return y;
}

// Softmax of the scores of q (dim) with the first `keys` rows of k, and of a mask, times the same rows of v; rows are
// `row` apart.
void attend(const float *q, const float *k, const float *v, int64_t row, int64_t keys, int64_t dim, float scale,
            const float *mask, float *scores, float *y) {
    for (int64_t j = 0; j < keys; ++j) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < dim; ++i) sum += q[i] * k[j * row + i];
        scores[j] = sum * scale + mask[j];
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

// Where a weight W (out, in) is a parameter, it is its codes and factors, as packed.cpp makes them, or twice W itself.

// ---- x (rows, in), W, rows (rows, out): rows + x W^T
KERNEL few_onto(ARGUMENTS) {
    CALL;
    if (!call.are("fwfff")) return 1;
    const int64_t rows = call.rows(0);
    const Matrix matrix(call, 1, call.columns(0));
    if (!few(rows) || !matrix.out || call.size(3) != rows * matrix.out || call.size(4) != call.size(3)) return 1;
    const float *x = call[0], *begin = call[3];
    float *y = call[4];
    each_piece(matrix.out, matrix.in, [=](int64_t first, int64_t last) {
        matrix.multiply(rows, x, y, first, last, begin);
    });
    return 0;
}

// ---- x (rows, in), weight and epsilon of an RMSNorm, three W: n W^T of each, with n the norm of x
KERNEL few_three(ARGUMENTS) {
    CALL;
    if (!call.are("fffwfwfwffff") || !call.per_column(1)) return 1;
    const int64_t rows = call.rows(0), in = call.columns(0);
    const Matrix matrices[] = {{call, 3, in}, {call, 5, in}, {call, 7, in}};
    for (int each = 0; each < 3; ++each)
        if (!matrices[each].out || call.size(9 + each) != rows * matrices[each].out) return 1;
    const float *x = few(rows) ? normalised(call) : nullptr;
    if (!x) return 1;
    each_piece(matrices[0].out + matrices[1].out + matrices[2].out, in, [&](int64_t first, int64_t last) {
        for (int each = 0; each < 3; ++each) {
            const int64_t out = matrices[each].out, begin = first > 0 ? first : 0, end = last < out ? last : out;
            matrices[each].multiply(rows, x, call[9 + each], begin, end, nullptr);
            first -= out, last -= out;
        }
    });
    return 0;
}

// ---- x (rows, in), weight and epsilon of an RMSNorm, G and U: silu(n G^T) (n U^T), with n the norm of x
KERNEL few_gated(ARGUMENTS) {
    CALL;
    if (!call.are("fffwfwff") || !call.per_column(1)) return 1;
    const int64_t rows = call.rows(0), in = call.columns(0);
    const Matrix gate(call, 3, in), up(call, 5, in);
    if (!gate.out || up.out != gate.out || call.size(7) != rows * gate.out) return 1;
    const float *x = few(rows) ? normalised(call) : nullptr;
    if (!x) return 1;
    float *y = call[7];
    each_piece(gate.out, 2 * in, [&](int64_t first, int64_t last) {
        const Matrix::Dot of_gate = gate.dot_of(rows), of_up = up.dot_of(rows);
        float gates[FEW], ups[FEW];
        for (int64_t j = first; j < last; ++j) {
            (gate.*of_gate)(x, j, gates);
            (up.*of_up)(x, j, ups);
            for (int64_t i = 0; i < rows; ++i) y[i * gate.out + j] = gates[i] / (1.0f + std::exp(-gates[i])) * ups[i];
        }
    });
    return 0;
}

// ---- query (rows, heads dim), key and value (rows, groups dim) of tokens; cosines and sines (batch, n, 1, dim), as
// rotary_forward takes them, with batch n = rows; keys and values of the cache (batch capacity, groups dim), which are
// written to; slots (rows) int32, where each token goes, which sees those of its sample up to its own; what is added to
// their scores (batch or 1, heads or 1, n or 1, capacity); heads and groups int32 (2); factors (2), the first of them
// that of the scores: (rows, heads dim)
KERNEL cached_attention(ARGUMENTS) {
    CALL;
    if (!call.are("fffffffififf") || ndims[3] != 4 || ndims[8] != 4 || call.size(9) != 2 || call.size(10) != 2) return 1;
    const int32_t *slots = static_cast<const int32_t *>(params[7]), *counts = static_cast<const int32_t *>(params[9]);
    const int64_t rows = call.rows(0), dim = call.columns(3), heads = counts[0], groups = counts[1];
    const int64_t batch = shapes[3][0], width = groups * dim, half = dim / 2;
    if (!few(rows) || batch < 1 || rows % batch || dim < 2 || dim % 2) return 1;
    if (heads < 1 || groups < 1 || heads % groups || call.columns(0) != heads * dim) return 1;
    if (call.size(1) != rows * width || call.size(2) != rows * width || call.size(7) != rows) return 1;
    if (call.size(3) != rows * dim || call.size(4) != rows * dim || call.size(11) != call.size(0)) return 1;
    if (call.columns(5) != width || call.rows(5) % batch || call.size(6) != call.size(5)) return 1;
    const int64_t capacity = call.rows(5) / batch, each = heads / groups, tokens = rows / batch;
    const int64_t scores[] = {batch, heads, tokens, capacity};
    const MaskSteps steps(shapes[8], scores);
    if (!steps.fit) return 1;
    int64_t most = 0;  // keys that a token sees
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t own = slots[row] - row / tokens * capacity;
        if (own < 0 || own >= capacity) return 1;
        most = own + 1 > most ? own + 1 : most;
    }
    const float *query = call[0], *cosines = call[3], *sines = call[4], *mask = call[8];
    const float scale = *call[10];
    float *keys = call[5], *values = call[6], *y = call[11];
    for (int64_t row = 0; row < rows; ++row) {
        const float *cos = cosines + row * dim, *sin = sines + row * dim, *key = call[1] + row * width;
        float *to = keys + slots[row] * width;
        for (int64_t i = 0; i < width; i += dim) turn(key + i, cos, sin, sin + half, to + i, half);
        std::memcpy(values + slots[row] * width, call[2] + row * width, width * sizeof(float));
    }
    std::atomic<bool> enough{true};
    each_piece(rows * heads, 2 * most * dim, [&](int64_t first, int64_t last) {
        float *turned = scratch.room(dim + capacity);
        if (!turned) enough = false;
        for (int64_t index = first; turned && index < last; ++index) {
            const int64_t row = index / heads, head = index % heads, sample = row / tokens, begin = sample * capacity;
            const float *cos = cosines + row * dim, *sin = sines + row * dim;
            turn(query + index * dim, cos, sin, sin + half, turned, half);
            const int64_t from = begin * width + head / each * dim;
            attend(turned, keys + from, values + from, width, slots[row] - begin + 1, dim, scale,
                   mask + steps.to(sample, head, row % tokens), turned + dim, y + index * dim);
        }
    });
    return enough ? 0 : 1;
}
