// Matrix products of a dense layer: x W^T, and dy W, its gradient with respect to x. W is (out, in).
//
// B is packed into panels of a few columns, A into strips of a few rows, so that the innermost loop reads both in order;
// the tile of C stays in registers. Goto and van de Geijn 2008, Anatomy of High-Performance Matrix Multiplication, ACM
// TOMS 34(3), sections 4 and 5. Sums run over the depth in one order, whatever the number of threads.
#include "common.h"

namespace {

constexpr int64_t STRIP = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;  // rows of a tile
constexpr int64_t PANEL = TILE_COLUMNS;
constexpr int64_t STRIPS = 96 / STRIP;  // that a thread takes at a time
constexpr int64_t DEPTH = 768;          // of a block: its strips and one panel stay in the second level of cache

struct Matrix {
    const float *data;
    int64_t row, column;  // steps
};

// Panel (depth, PANEL) of B (depth, columns) from its column `first`; zeros beyond the last one.
void pack_panel(const Matrix &b, int64_t depth, int64_t columns, int64_t first, float *panel) {
    const int64_t width = columns - first < PANEL ? columns - first : PANEL;
    const float *from = b.data + first * b.column;
    if (b.column == 1) {
        for (int64_t k = 0; k < depth; ++k, panel += PANEL) {
            std::memcpy(panel, from + k * b.row, width * sizeof(float));
            for (int64_t j = width; j < PANEL; ++j) panel[j] = 0.0f;
        }
        return;
    }
    for (int64_t k = 0; k < depth; ++k, panel += PANEL) {
        for (int64_t j = 0; j < width; ++j) panel[j] = from[j * b.column + k * b.row];
        for (int64_t j = width; j < PANEL; ++j) panel[j] = 0.0f;
    }
}

// Strip (depth, STRIP) of A (rows, depth) from its row `first`, whose rows are contiguous; zeros beyond the last one.
void pack_strip(const float *a, int64_t a_row, int64_t rows, int64_t depth, float *strip) {
    for (int64_t i = 0; i < STRIP; ++i) {
        const float *from = a + i * a_row;
        if (i < rows)
            for (int64_t k = 0; k < depth; ++k) strip[k * STRIP + i] = from[k];
        else
            for (int64_t k = 0; k < depth; ++k) strip[k * STRIP + i] = 0.0f;
    }
}

// C (rows, columns) = A (rows, depth) B (depth, columns); A and C are contiguous. Returns 0, or 1 without memory.
int multiply(int64_t rows, int64_t columns, int64_t depth, const float *a, const Matrix &b, float *c) {
    const int64_t panels = (columns + PANEL - 1) / PANEL;
    float *packed = scratch.room(panels * depth * PANEL);
    if (!packed && panels > 0 && depth > 0) return 1;
    each_piece(panels, depth * PANEL, [&](int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; ++panel)
            pack_panel(b, depth, columns, panel * PANEL, packed + panel * depth * PANEL);
    });
    const int64_t chunk = STRIPS * STRIP, blocks = depth ? (depth + DEPTH - 1) / DEPTH : 1;
    std::atomic<bool> failed{false};
    Pool::instance().run((rows + chunk - 1) / chunk, [&](int64_t index) {
        thread_local Scratch own;  // `scratch` may hold the panels
        float *strips = own.room(chunk * DEPTH + STRIP * PANEL);
        if (!strips) {
            failed = true;
            return;
        }
        float *corner = strips + chunk * DEPTH;
        const int64_t first = index * chunk, last = first + chunk < rows ? first + chunk : rows;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t from = depth * block / blocks, deep = depth * (block + 1) / blocks - from;
            for (int64_t row = first; row < last; row += STRIP)
                pack_strip(a + row * depth + from, depth, last - row, deep, strips + (row - first) * deep);
            for (int64_t panel = 0; panel < panels; ++panel) {
                const float *b_panel = packed + (panel * depth + from) * PANEL;
                const int64_t column = panel * PANEL;
                for (int64_t row = first; row < last; row += STRIP) {
                    float *to = c + row * columns + column;
                    const float *strip = strips + (row - first) * deep;
                    if (last - row >= STRIP && columns - column >= PANEL) {
                        tile<STRIP>(deep, strip, 1, STRIP, b_panel, PANEL, to, columns, block > 0);
                        continue;
                    }
                    tile<STRIP>(deep, strip, 1, STRIP, b_panel, PANEL, corner, PANEL, false);
                    const int64_t high = last - row < STRIP ? last - row : STRIP;
                    const int64_t wide = columns - column < PANEL ? columns - column : PANEL;
                    for (int64_t i = 0; i < high; ++i)
                        for (int64_t j = 0; j < wide; ++j)
                            to[i * columns + j] = corner[i * PANEL + j] + (block ? to[i * columns + j] : 0.0f);
                }
            }
        }
    });
    scratch.trim();
    return failed ? 1 : 0;
}

}  // namespace

// ---- x (rows, in), W (out, in), x W^T
KERNEL dense_forward(ARGUMENTS) {
    CALL;
    if (!call.floats(3) || ndims[0] != 2 || ndims[1] != 2 || shapes[0][1] != shapes[1][1]) return 1;
    const int64_t rows = shapes[0][0], in = shapes[0][1], out = shapes[1][0];
    if (call.size(2) != rows * out) return 1;
    return multiply(rows, out, in, call[0], {call[1], 1, in}, call[2]);
}

// ---- dy (rows, out), W (out, in), dy W
KERNEL dense_backward(ARGUMENTS) {
    CALL;
    if (!call.floats(3) || ndims[0] != 2 || ndims[1] != 2 || shapes[0][1] != shapes[1][0]) return 1;
    const int64_t rows = shapes[0][0], out = shapes[0][1], in = shapes[1][1];
    if (call.size(2) != rows * in) return 1;
    return multiply(rows, in, out, call[0], {call[1], in, 1}, call[2]);
}
