// The losses of a language model's head and their gradients with respect to its rows, in one pass and without the logits.
//
// L_i = log(sum_v e^(z_iv)) - z_i,label for z = x W^T, and dL_i/dx_i = sum_v p_iv W_v - W_label with the probabilities
// p of row i: a row's gradient needs nothing but the row. The classes go through a block at a time: its part of z stays
// in the cache, and what it adds to both sums is relative to the largest z so far, as in Dao et al. 2022, arXiv:2205.14135,
// section 3.1. Wijmans et al. 2024, arXiv:2411.09009, section 4: the logits need not be in memory; theirs are computed
// again backward. Rows whose label is negative are left out.
#include <cfloat>

#include "product.h"

namespace {

constexpr int64_t CLASSES = 32 * PANEL;  // of a block

// Rows that count, close together, and what is known of each. Of no row where there is no memory.
struct Counted {
    Scratch memory;
    int64_t rows = 0;
    float *x = nullptr, *block = nullptr, *tops = nullptr, *sums = nullptr, *chosen = nullptr;
    int64_t *labels = nullptr;

    Counted(const float *from, const int32_t *given, int64_t all, int64_t in, int64_t classes) {
        const auto counts = [=](int64_t row) { return given[row] >= 0 && given[row] < classes; };
        for (int64_t row = 0; row < all; ++row) rows += counts(row);
        const int64_t wide = classes < CLASSES ? classes : CLASSES;
        float *room = memory.room(rows * (2 + in + wide + 3) + 1);
        if (!room) return;
        labels = reinterpret_cast<int64_t *>(room);
        x = room + 2 * rows, block = x + rows * in, tops = block + rows * wide, sums = tops + rows, chosen = sums + rows;
        int64_t to = 0;
        for (int64_t row = 0; row < all; ++row) {
            if (!counts(row)) continue;
            std::memcpy(x + to * in, from + row * in, in * sizeof(float));
            tops[to] = -FLT_MAX, sums[to] = chosen[to] = 0.0f, labels[to++] = given[row];
        }
    }
};

}  // namespace

// ---- x (rows, in), W (classes, in), labels (rows,): losses (rows,), d(each loss)/d(its row) (rows, in)
// A negative label is ignored: its loss and gradient are 0. A label of no class gives NaN.
KERNEL head_loss(ARGUMENTS) {
    CALL;
    if (!call.floats(5, 2) || ndims[0] != 2 || ndims[1] != 2 || shapes[0][1] != shapes[1][1]) return 1;
    const int64_t rows = shapes[0][0], in = shapes[0][1], classes = shapes[1][0];
    if (!call.per_row(2) || !call.per_row(3) || !call.per_entry(4)) return 1;
    const float *table = call[1];
    const int32_t *given = static_cast<const int32_t *>(params[2]);
    float *losses = call[3], *slopes = call[4];
    const Counted kept(call[0], given, rows, in, classes);
    if (!kept.x) return 1;
    for (int64_t first = 0; kept.rows && first < classes; first += CLASSES) {
        const int64_t wide = classes - first < CLASSES ? classes - first : CLASSES;
        const float *part = table + first * in;
        if (multiply(kept.rows, wide, Left{{kept.x, in, 1}, in}, Matrix{part, 1, in}, nullptr, kept.block)) return 1;
        each_row(kept.rows, wide, [=, &kept](int64_t row) {
            float *z = kept.block + row * wide, *slope = slopes + row * in;
            const float top = largest(z, wide), before = kept.tops[row];
            const int64_t label = kept.labels[row] - first;
            if (label >= 0 && label < wide) kept.chosen[row] = z[label];
            if (top > before) {
                const float factor = exp_of_negative(before - top);
                for (int64_t i = 0; first && i < in; ++i) slope[i] *= factor;
                kept.sums[row] *= factor, kept.tops[row] = top;
            }
            kept.sums[row] += exponentials(z, z, wide, kept.tops[row]);
        });
        const Left powers{{kept.block, wide, 1}, wide};
        if (multiply(kept.rows, in, powers, Matrix{part, in, 1}, nullptr, slopes, first > 0)) return 1;
    }
    int64_t from = kept.rows;
    for (int64_t row = rows - 1; row >= 0; --row) {  // from the last: a row that counts is at its place or before it
        float *slope = slopes + row * in;
        if (given[row] < 0 || given[row] >= classes) {
            losses[row] = given[row] < 0 ? 0.0f : NAN;
            for (int64_t i = 0; i < in; ++i) slope[i] = losses[row];
            continue;
        }
        --from;
        losses[row] = std::log(kept.sums[from]) + (kept.tops[from] - kept.chosen[from]);
        const float *sum = slopes + from * in, *right = table + given[row] * in;
        const float factor = 1.0f / kept.sums[from];
        for (int64_t i = 0; i < in; ++i) slope[i] = factor * sum[i] - right[i];
    }
    return 0;
}
