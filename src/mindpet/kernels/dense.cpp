// Matrix products of a dense layer: x W^T, and dy W, its gradient with respect to x. W is (out, in).
#include "product.h"

namespace {

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

int multiply(int64_t rows, int64_t columns, int64_t depth, const float *a, const Matrix &b, float *c) {
    const auto pack = [&](int64_t first, float *panel) { pack_panel(b, depth, columns, first, panel); };
    return multiply(rows, columns, depth, a, pack, c);
}

}  // namespace

// ---- x (rows, in), W (out, in), x W^T
KERNEL dense_forward(ARGUMENTS) {
    CALL;
    if (!call.floats(3) || ndims[0] != 2 || ndims[1] != 2 || shapes[0][1] != shapes[1][1]) return 1;
    const int64_t rows = shapes[0][0], in = shapes[0][1], out = shapes[1][0];
    if (call.size(2) != rows * out) return 1;
    return multiply(rows, out, in, call[0], Matrix{call[1], 1, in}, call[2]);
}

// ---- dy (rows, out), W (out, in), dy W
KERNEL dense_backward(ARGUMENTS) {
    CALL;
    if (!call.floats(3) || ndims[0] != 2 || ndims[1] != 2 || shapes[0][1] != shapes[1][0]) return 1;
    const int64_t rows = shapes[0][0], out = shapes[0][1], in = shapes[1][1];
    if (call.size(2) != rows * in) return 1;
    return multiply(rows, in, out, call[0], Matrix{call[1], in, 1}, call[2]);
}
