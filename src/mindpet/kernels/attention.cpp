// softmax(Q K^T scale + mask) V, head by head, without the probabilities in memory: the forward pass keeps nothing but
// its output, and the backward pass computes the probabilities again, a block of queries at a time, where they fit into
// the cache. Dao et al. 2022, FlashAttention, arXiv:2205.14135, section 3, with whole rows of scores in the place of tiles.
#include "common.h"

namespace {

constexpr int64_t TILE_ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;
constexpr int64_t TILE_WIDE = 2, COLUMNS = TILE_WIDE * LANES;
constexpr int64_t FEW_ROWS = 4;  // of a smaller tile, for the rows that are left over
constexpr int64_t QUERIES = 96;  // in a block
constexpr int64_t MASKED_QUERIES = 32;  // in a block where each query has its own row of the mask

// `i` rows are done; the next ones, as many tiles of ROWS as fit.
template <int64_t ROWS>
void tiles(int64_t &i, int64_t rows, int64_t depth, const float *a, int64_t row, int64_t column, const float *b,
           int64_t b_row, float *c, int64_t c_row, bool add) {
    for (; i + ROWS <= rows; i += ROWS) {
        float *to = c + i * c_row;
        tile<ROWS, TILE_WIDE>(depth, a + i * row, row, column, b, b_row, to, c_row, add ? to : nullptr, c_row);
    }
}

// C (rows, columns) = or += A (rows, depth) B (depth, columns); `columns` is a multiple of COLUMNS.
void multiply(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t row, int64_t column, const float *b,
              int64_t b_row, float *c, int64_t c_row, bool add) {
    for (int64_t j = 0; j < columns; j += COLUMNS) {
        int64_t i = 0;
        tiles<TILE_ROWS>(i, rows, depth, a, row, column, b + j, b_row, c + j, c_row, add);
        tiles<TILE_ROWS * 2 / 3>(i, rows, depth, a, row, column, b + j, b_row, c + j, c_row, add);
        tiles<FEW_ROWS>(i, rows, depth, a, row, column, b + j, b_row, c + j, c_row, add);
        tiles<1>(i, rows, depth, a, row, column, b + j, b_row, c + j, c_row, add);
    }
}

inline int64_t padded(int64_t size) { return (size + COLUMNS - 1) / COLUMNS * COLUMNS; }

// y (rows, padded columns), zeros on the right.
void pack(const float *x, int64_t x_row, int64_t rows, int64_t columns, float *y) {
    const int64_t width = padded(columns);
    for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(y + i * width, x + i * x_row, columns * sizeof(float));
        for (int64_t j = columns; j < width; ++j) y[i * width + j] = 0.0f;
    }
}

// y (columns, padded rows), the transpose, zeros on the right.
void pack_transposed(const float *x, int64_t x_row, int64_t rows, int64_t columns, float *y) {
    const int64_t width = padded(rows);
    const int64_t whole_rows = rows / LANES * LANES, whole_columns = columns / LANES * LANES;
    for (int64_t i = 0; i < whole_rows; i += LANES)
        for (int64_t j = 0; j < whole_columns; j += LANES) transpose(x + i * x_row + j, x_row, y + j * width + i, width);
    for (int64_t j = 0; j < columns; ++j) {
        for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) y[j * width + i] = x[i * x_row + j];
        for (int64_t i = rows; i < width; ++i) y[j * width + i] = 0.0f;
    }
}

// The squared length of the longest row; NaN or infinite where an entry is.
float longest(const float *x, int64_t x_row, int64_t rows, int64_t columns) {
    float top = 0.0f, all = 0.0f;
    for (int64_t i = 0; i < rows; ++i) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < columns; ++j) sum += x[i * x_row + j] * x[i * x_row + j];
        top = sum > top ? sum : top;
        all += sum;
    }
    return std::isfinite(all) ? top : all;
}

// The keys that a block of queries sees: so many from `first` on, a multiple of COLUMNS.
struct Seen {
    int64_t first, count;
    int64_t width() const { return padded(count); }
};

// query (batch, queries, heads * dim), key and value (batch, keys, groups * dim), mask (batch or 1, heads or 1,
// queries or 1, keys), words (int32), dropout (int32: two keys, threshold, process), heads (int32: heads, groups),
// factors (scale of the scores, factor of what is kept). One word alone: nothing is dropped.
struct Attention {
    int64_t batch, queries, keys, heads, groups, dim, key_width, dim_width;
    int64_t query_row, key_row;
    MaskSteps steps;
    const float *query, *key, *value, *mask;
    const void *words, *dropout;
    int64_t pool;
    float scale, kept;
    bool drops, fits = false;

    explicit Attention(const Call &call) {
        for (int index = 0; index < 3; ++index)
            if (call.ndims[index] != 3) return;
        if (call.ndims[3] != 4 || call.size(5) != 4 || call.size(6) != 2 || call.size(7) != 2) return;
        const int32_t *counts = static_cast<const int32_t *>(call.params[6]);
        heads = counts[0], groups = counts[1];
        batch = call.shapes[0][0], queries = call.shapes[0][1], query_row = call.shapes[0][2];
        keys = call.shapes[1][1], key_row = call.shapes[1][2];
        if (heads < 1 || groups < 1 || heads % groups || query_row % heads) return;
        dim = query_row / heads;
        if (key_row != groups * dim || call.shapes[1][0] != batch || call.size(2) != call.size(1)) return;
        const int64_t scores[] = {batch, heads, queries, keys};
        steps = MaskSteps(call.shapes[3], scores);
        if (!steps.fit) return;
        key_width = padded(keys), dim_width = padded(dim);
        query = call[0], key = call[1], value = call[2], mask = call[3];
        words = call.params[4], dropout = call.params[5];
        pool = call.size(4), drops = pool > 1;
        scale = call[7][0], kept = call[7][1];
        if (drops && !mask_of_dropout().fits(batch * heads * queries, keys)) return;
        fits = true;
    }

    // Where a query of a head is in `query`, and what belongs to it in its like.
    int64_t place(int64_t sample, int64_t head, int64_t index) const {
        return (sample * queries + index) * query_row + head * dim;
    }

    int64_t block() const { return steps.third ? MASKED_QUERIES : QUERIES; }

    // How far a score may be from 0 is |q| |k| scale: keys whose probability is 0 for all of a block of queries, whatever
    // their scores are, are left out at both ends. `reach` is longest() of the keys, or not finite where nothing may be.
    Seen seen(int64_t sample, int64_t head, int64_t first, int64_t rows, float reach) const {
        const float *q = query + place(sample, head, first);
        const float bound = 1.001f * std::abs(scale) * std::sqrt(longest(q, query_row, rows, dim) * reach);
        if (!std::isfinite(bound)) return {0, keys};
        int64_t begin = key_width, end = 0;  // what any query sees, in whole COLUMNS
        for (int64_t i = 0; i < (steps.third ? rows : 1); ++i) {
            const float *add = mask + steps.to(sample, head, first + i);
            const float most = largest(add, keys);  // with a score, rounded to the nearest that a float holds
            const float least = most - 2.0f * bound - 88.0f - 5e-7f * std::abs(most);
            const auto hidden = [&](int64_t j) {
                const int64_t count = keys - j < COLUMNS ? keys - j : COLUMNS;
                int visible = 0;
#pragma omp simd reduction(+ : visible)
                for (int64_t k = 0; k < count; ++k) visible += !(add[j + k] < least);
                return visible == 0;
            };
            int64_t j = 0;
            while (j < begin && hidden(j)) j += COLUMNS;
            begin = j < begin ? j : begin;
            for (j = key_width; j > end && hidden(j - COLUMNS);) j -= COLUMNS;
            end = j > end ? j : end;
        }
        if (begin >= end) return {0, keys};
        return {begin, (end < keys ? end : keys) - begin};
    }

    // Probabilities (rows, seen.width) of a block of queries, before dropout; `transposed` is the packed key.
    void probabilities(int64_t sample, int64_t head, int64_t first, int64_t rows, const Seen &seen,
                       const float *transposed, float *p) const {
        const float *q = query + place(sample, head, first);
        const int64_t count = seen.count;
        multiply(rows, seen.width(), dim, q, query_row, 1, transposed + seen.first, key_width, p, key_width, false);
        for (int64_t i = 0; i < rows; ++i) {
            float *row = p + i * key_width;
            const float *add = mask + steps.to(sample, head, first + i) + seen.first;
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) row[j] = row[j] * scale + add[j];
            softmax_row(row, count);
        }
    }

    // longest() of a sample's keys of a group; not finite where one of its values is not: 0 times it is not 0.
    float reach(int64_t begin) const {
        const float values = longest(value + begin, key_row, keys, dim);
        return std::isfinite(values) ? longest(key + begin, key_row, keys, dim) : values;
    }

    Dropout mask_of_dropout() const { return Dropout(words, pool, dropout, batch * heads * queries); }

    // What the probabilities of one query are multiplied by.
    void factors(int64_t sample, int64_t head, int64_t index, float *factor) const {
        mask_of_dropout().factors((sample * heads + head) * queries + index, keys, kept, factor);
    }
};

// work(sample, group, scratch) for every pair, on all threads; a thread without memory fails the call.
template <class Work>
int each_group(const Attention &attention, int64_t floats, const Work &work) {
    std::atomic<bool> failed{false};
    Pool::instance().run(attention.batch * attention.groups, [&](int64_t index) {
        float *room = scratch.room(floats);
        if (room)
            work(index / attention.groups, index % attention.groups, room);
        else
            failed = true;
    });
    return failed ? 1 : 0;
}

}  // namespace

// ---- query, key, value, mask, words, dropout, heads, factors, output (batch, queries, heads * dim)
KERNEL attention_forward(ARGUMENTS) {
    CALL;
    if (!call.are("ffffiiiff")) return 1;
    const Attention self(call);
    if (!self.fits || call.size(8) != call.size(0)) return 1;
    const int64_t width = self.key_width, wide = self.dim_width, dim = self.dim;
    const int64_t floats = dim * width + self.keys * wide + QUERIES * (width + wide) + width;
    float *output = call[8];
    return each_group(self, floats, [&, width, wide, dim](int64_t sample, int64_t group, float *room) {
        float *key = room, *value = key + dim * width, *p = value + self.keys * wide;
        float *mixed = p + QUERIES * width, *factor = mixed + QUERIES * wide;
        const int64_t begin = sample * self.keys * self.key_row + group * dim;
        pack_transposed(self.key + begin, self.key_row, self.keys, dim, key);
        pack(self.value + begin, self.key_row, self.keys, dim, value);
        const float reach = self.reach(begin);
        const int64_t each = self.heads / self.groups, block = self.block();
        for (int64_t head = group * each; head < (group + 1) * each; ++head)
            for (int64_t first = 0; first < self.queries; first += block) {
                const int64_t rows = self.queries - first < block ? self.queries - first : block;
                const Seen seen = self.seen(sample, head, first, rows, reach);
                self.probabilities(sample, head, first, rows, seen, key, p);
                if (self.drops)
                    for (int64_t i = 0; i < rows; ++i) {
                        self.factors(sample, head, first + i, factor);
                        float *row = p + i * width;
                        const float *with = factor + seen.first;
#pragma omp simd
                        for (int64_t j = 0; j < seen.count; ++j) row[j] *= with[j];
                    }
                multiply(rows, wide, seen.count, p, width, 1, value + seen.first * wide, wide, mixed, wide, false);
                for (int64_t i = 0; i < rows; ++i)
                    std::memcpy(output + self.place(sample, head, first + i), mixed + i * wide, dim * sizeof(float));
            }
    });
}

// query, key, value, mask, words, dropout, heads, factors, output, d(output), d(query), d(key), d(value)
KERNEL attention_backward(ARGUMENTS) {
    CALL;
    if (!call.are("ffffiiiffffff")) return 1;
    const Attention self(call);
    if (!self.fits) return 1;
    for (int index = 8; index < 13; ++index)
        if (call.size(index) != call.size(index < 11 ? 0 : 1)) return 1;
    const int64_t width = self.key_width, wide = self.dim_width, dim = self.dim, keys = self.keys;
    const int64_t floats = 2 * dim * width + 3 * keys * wide + QUERIES * (3 * width + 3 * wide) + width;
    const float *output = call[8], *d_output = call[9];
    float *d_query = call[10], *d_key = call[11], *d_value = call[12];
    return each_group(self, floats, [&, width, wide, dim, keys](int64_t sample, int64_t group, float *room) {
        float *key_across = room, *value_across = key_across + dim * width, *key = value_across + dim * width;
        float *key_sum = key + keys * wide, *value_sum = key_sum + keys * wide, *p = value_sum + keys * wide;
        float *dropped = p + QUERIES * width, *d_p = dropped + QUERIES * width, *q = d_p + QUERIES * width;
        float *d_out = q + QUERIES * wide, *d_q = d_out + QUERIES * wide, *factor = d_q + QUERIES * wide;
        const int64_t begin = sample * keys * self.key_row + group * dim;
        pack_transposed(self.key + begin, self.key_row, keys, dim, key_across);
        pack_transposed(self.value + begin, self.key_row, keys, dim, value_across);
        pack(self.key + begin, self.key_row, keys, dim, key);
        std::memset(key_sum, 0, 2 * keys * wide * sizeof(float));
        for (int64_t j = 0; j < width; ++j) factor[j] = 1.0f;
        const float reach = self.reach(begin);
        const int64_t each = self.heads / self.groups, block = self.block();
        for (int64_t head = group * each; head < (group + 1) * each; ++head)
            for (int64_t first = 0; first < self.queries; first += block) {
                const int64_t rows = self.queries - first < block ? self.queries - first : block;
                const int64_t place = self.place(sample, head, first);
                const float slope = longest(d_output + place, self.query_row, rows, dim);
                const Seen seen = self.seen(sample, head, first, rows, std::isfinite(slope) ? reach : slope);
                const int64_t count = seen.count;
                self.probabilities(sample, head, first, rows, seen, key_across, p);
                pack(self.query + place, self.query_row, rows, dim, q);
                pack(d_output + place, self.query_row, rows, dim, d_out);
                multiply(rows, seen.width(), dim, d_out, wide, 1, value_across + seen.first, width, d_p, width, false);
                for (int64_t i = 0; i < rows; ++i) {
                    if (self.drops) self.factors(sample, head, first + i, factor);
                    const float *out = output + place + i * self.query_row, *grad = d_out + i * wide;
                    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
                    for (int64_t j = 0; j < dim; ++j) dot += out[j] * grad[j];
                    float *row = p + i * width, *with = dropped + i * width, *slope = d_p + i * width;
                    const float *each_factor = factor + seen.first;
#pragma omp simd
                    for (int64_t j = 0; j < count; ++j) {
                        with[j] = row[j] * each_factor[j];
                        slope[j] = row[j] * (slope[j] * each_factor[j] - dot) * self.scale;
                    }
                }
                const int64_t start = seen.first * wide;
                multiply(count, wide, rows, dropped, 1, width, d_out, wide, value_sum + start, wide, true);
                multiply(count, wide, rows, d_p, 1, width, q, wide, key_sum + start, wide, true);
                multiply(rows, wide, count, d_p, width, 1, key + start, wide, d_q, wide, false);
                for (int64_t i = 0; i < rows; ++i)
                    std::memcpy(d_query + place + i * self.query_row, d_q + i * wide, dim * sizeof(float));
            }
        for (int64_t i = 0; i < keys; ++i) {
            std::memcpy(d_key + begin + i * self.key_row, key_sum + i * wide, dim * sizeof(float));
            std::memcpy(d_value + begin + i * self.key_row, value_sum + i * wide, dim * sizeof(float));
        }
    });
}
