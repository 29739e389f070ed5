// What a LoRA branch of a small rank multiplies with A and B, where a matrix has a few columns and the time goes into
// reading the other one: each of x and dy is read once for all that is made from it.
#include "product.h"

namespace {

constexpr int64_t NARROW = LANES == 16 ? 16 : 8;  // rows of a tile of one register
constexpr int64_t CHUNK_ROWS = 64;                // that a thread takes at a time: they stay in its cache
constexpr int64_t PARTS = 8;                      // partial sums of a sum over rows, whatever the number of threads

// B (depth, rank) as panels (depth, LANES), zeros beyond the last column.
void pack_narrow(const Matrix &b, int64_t depth, int64_t rank, float *panels) {
    for (int64_t first = 0; first < rank; first += LANES) pack_panel<1>(b, depth, rank, first, panels + first * depth);
}

// y (rows, rank) = factor x (rows, depth) B, for a B in panels.
void narrow_rows(int64_t rows, int64_t depth, int64_t rank, const float *x, const float *panels, float factor,
                 float *y) {
    float sums[NARROW * LANES];
    for (int64_t row = 0; row < rows; row += NARROW) {
        const int64_t high = rows - row < NARROW ? rows - row : NARROW;
        for (int64_t first = 0; first < rank; first += LANES) {
            const Matrix strip{x + row * depth, depth, 1};
            tile_of<NARROW, 1>(high, depth, strip, panels + first * depth, LANES, sums, LANES, nullptr, 0);
            const int64_t wide = rank - first < LANES ? rank - first : LANES;
            for (int64_t i = 0; i < high; ++i)
                for (int64_t j = 0; j < wide; ++j) y[(row + i) * rank + first + j] = factor * sums[i * LANES + j];
        }
    }
}

// sums (rank, columns) += h^T y, for h (rows, rank) and y (rows, columns).
void add_outer(int64_t rows, int64_t rank, int64_t columns, const float *h, const float *y, float *sums) {
    for (int64_t first = 0; first < rank; first += STRIP) {
        const int64_t high = rank - first < STRIP ? rank - first : STRIP;
        const Matrix strip{h + first, 1, rank};
        float *to = sums + first * columns;
        int64_t column = 0;
        for (; column + PANEL <= columns; column += PANEL)
            tile_of<STRIP>(high, rows, strip, y + column, columns, to + column, columns, to + column, columns);
        for (int64_t k = 0; column < columns && k < rows; ++k)
            for (int64_t i = 0; i < high; ++i)
                for (int64_t j = column; j < columns; ++j)
                    to[i * columns + j] += strip.data[i + k * rank] * y[k * columns + j];
    }
}

// Asks for a chunk of rows in the order of memory: a product goes through it by columns, which no processor foresees.
void prefetch(const float *x, int64_t floats) {
    for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(x + i);
}

// The sum of PARTS matrices (rank, columns) times `factor`, as it is or transposed.
void total(int64_t parts, int64_t rank, int64_t columns, const float *sums, float factor, bool transposed, float *to) {
    each_piece(columns, parts * rank, [=](int64_t first, int64_t last) {
        for (int64_t i = 0; i < rank; ++i)
            for (int64_t j = first; j < last; ++j) {
                float sum = 0.0f;
                for (int64_t part = 0; part < parts; ++part) sum += sums[(part * rank + i) * columns + j];
                to[transposed ? j * rank + i : i * columns + j] = factor * sum;
            }
    });
}

// body(first, rows, sums) for chunks of rows; `sums` are the partial sums (rank, columns) that the chunk adds to.
template <class Body>
void in_chunks(int64_t rows, int64_t parts, int64_t entries, float *sums, const Body &body) {
    Pool::instance().run(parts, [&](int64_t part) {
        const int64_t end = rows * (part + 1) / parts;
        for (int64_t first = rows * part / parts; first < end; first += CHUNK_ROWS)
            body(first, end - first < CHUNK_ROWS ? end - first : CHUNK_ROWS, sums + part * entries);
    });
}

int64_t parts_of(int64_t rows) {
    const int64_t chunks = rows / CHUNK_ROWS;
    return chunks < 1 ? 1 : chunks < PARTS ? chunks : PARTS;
}

float *zeros(int64_t floats) { return new (std::nothrow) float[floats](); }

}  // namespace

// ---- x (rows, in), A (rank, in), x A^T
KERNEL narrow_forward(ARGUMENTS) {
    CALL;
    if (!call.floats(3) || ndims[0] != 2 || ndims[1] != 2 || shapes[0][1] != shapes[1][1]) return 1;
    const int64_t rows = shapes[0][0], in = shapes[0][1], rank = shapes[1][0];
    if (call.size(2) != rows * rank) return 1;
    const std::unique_ptr<float[]> panels(zeros((rank + LANES) * in));
    if (!panels) return 1;
    pack_narrow(Matrix{call[1], 1, in}, in, rank, panels.get());
    each_piece((rows + NARROW - 1) / NARROW, NARROW * in, [&](int64_t first, int64_t last) {
        const int64_t row = first * NARROW, end = last * NARROW < rows ? last * NARROW : rows;
        narrow_rows(end - row, in, rank, call[0] + row * in, panels.get(), 1.0f, call[2] + row * rank);
    });
    return 0;
}

// dy (rows, out), B (out, rank), h (rows, rank), s (1,): s dy B, and s dy^T h
KERNEL narrow_backward(ARGUMENTS) {
    CALL;
    if (!call.floats(6) || ndims[0] != 2 || ndims[1] != 2 || ndims[2] != 2 || call.size(3) != 1) return 1;
    const int64_t rows = shapes[0][0], out = shapes[0][1], rank = shapes[1][1];
    if (shapes[1][0] != out || shapes[2][0] != rows || shapes[2][1] != rank) return 1;
    if (call.size(4) != rows * rank || call.size(5) != out * rank) return 1;
    const int64_t parts = parts_of(rows);
    const std::unique_ptr<float[]> panels(zeros((rank + LANES) * out)), sums(zeros(parts * rank * out));
    if (!panels || !sums) return 1;
    pack_narrow(Matrix{call[1], rank, 1}, out, rank, panels.get());
    in_chunks(rows, parts, rank * out, sums.get(), [&](int64_t first, int64_t count, float *own) {
        const float *dy = call[0] + first * out;
        narrow_rows(count, out, rank, dy, panels.get(), call[3][0], call[4] + first * rank);
        add_outer(count, rank, out, call[2] + first * rank, dy, own);
    });
    total(parts, rank, out, sums.get(), call[3][0], true, call[5]);
    return 0;
}

// dh (rows, rank), x (rows, in), dh^T x
KERNEL narrow_backward_weight(ARGUMENTS) {
    CALL;
    if (!call.floats(3) || ndims[0] != 2 || ndims[1] != 2 || shapes[0][0] != shapes[1][0]) return 1;
    const int64_t rows = shapes[0][0], rank = shapes[0][1], in = shapes[1][1], parts = parts_of(rows);
    if (call.size(2) != rank * in) return 1;
    const std::unique_ptr<float[]> sums(zeros(parts * rank * in));
    if (!sums) return 1;
    in_chunks(rows, parts, rank * in, sums.get(), [&](int64_t first, int64_t count, float *own) {
        prefetch(call[1] + first * in, count * in);
        add_outer(count, rank, in, call[0] + first * rank, call[1] + first * in, own);
    });
    total(parts, rank, in, sums.get(), 1.0f, false, call[2]);
    return 0;
}
