// Matrix products of a dense layer, alone and with a LoRA branch: forward and backward. W is (out, in).
#include "product.h"

namespace {

// The sizes of x (rows, in) and W (out, in), of the parameters `x` and `weight` of a call.
struct Sizes {
    int64_t rows = 0, in = 0, out = 0;
    bool fit = false;

    Sizes(const Call &call, int x, int weight) {
        if (call.ndims[x] != 2 || call.ndims[weight] != 2 || call.shapes[x][1] != call.shapes[weight][1]) return;
        rows = call.shapes[x][0], in = call.shapes[x][1], out = call.shapes[weight][0];
        fit = true;
    }
};

// C (rows, columns) = bias + A B + A2 (factor B2) for matrices in memory.
int multiply(int64_t rows, int64_t columns, const Left &left, const Matrix &b, const Matrix &b2, float factor,
             const float *bias, float *c) {
    const auto pack = [&](int64_t first, int64_t from, int64_t deep, float *panel) {
        const int64_t own = left.own(from, deep);
        pack_panel(b.from(from, 0), own, columns, first, panel);
        pack_panel(b2.from(from + own - left.depth, 0), deep - own, columns, first, panel + own * PANEL, factor);
    };
    return multiply(rows, columns, left, pack, bias, c);
}

// x W^T + bias
int product(const Sizes &size, const float *x, const float *weight, const float *bias, float *y) {
    return multiply(size.rows, size.out, Left{{x, size.in, 1}, size.in}, Matrix{weight, 1, size.in}, bias, y);
}

}  // namespace

// ---- x (rows, in), W (out, in), x W^T
KERNEL dense_forward(ARGUMENTS) {
    CALL;
    if (!call.floats(3)) return 1;
    const Sizes size(call, 0, 1);
    if (!size.fit || call.size(2) != size.rows * size.out) return 1;
    return product(size, call[0], call[1], nullptr, call[2]);
}

// x (rows, in), W (out, in), b (out,), x W^T + b
KERNEL dense_forward_bias(ARGUMENTS) {
    CALL;
    if (!call.floats(4)) return 1;
    const Sizes size(call, 0, 1);
    if (!size.fit || call.size(2) != size.out || call.size(3) != size.rows * size.out) return 1;
    return product(size, call[0], call[1], call[2], call[3]);
}

// dy (rows, out), W (out, in), dy W
KERNEL dense_backward(ARGUMENTS) {
    CALL;
    if (!call.floats(3) || ndims[0] != 2 || ndims[1] != 2 || shapes[0][1] != shapes[1][0]) return 1;
    const int64_t rows = shapes[0][0], out = shapes[0][1], in = shapes[1][1];
    if (call.size(2) != rows * in) return 1;
    return multiply(rows, in, Left{{call[0], out, 1}, out}, Matrix{call[1], in, 1}, nullptr, call[2]);
}

// dy (rows, out), x (rows, in), dy^T x
KERNEL dense_backward_weight(ARGUMENTS) {
    CALL;
    if (!call.floats(3) || ndims[0] != 2 || ndims[1] != 2 || shapes[0][0] != shapes[1][0]) return 1;
    const int64_t rows = shapes[0][0], out = shapes[0][1], in = shapes[1][1];
    if (call.size(2) != out * in) return 1;
    return multiply(out, in, Left{{call[0], 1, out}, rows}, Matrix{call[1], in, 1}, nullptr, call[2]);
}

// ---- x (rows, in), W (out, in), b (out,), h (rows, rank), B (out, rank), s (1,): x W^T + b + s h B^T
KERNEL lora_forward(ARGUMENTS) {
    CALL;
    if (!call.floats(7)) return 1;
    const Sizes size(call, 0, 1), branch(call, 3, 4);
    if (!size.fit || !branch.fit || branch.rows != size.rows || branch.out != size.out) return 1;
    if (call.size(2) != size.out || call.size(5) != 1 || call.size(6) != size.rows * size.out) return 1;
    const Left left{{call[0], size.in, 1}, size.in, {call[3], branch.in, 1}, branch.in};
    const Matrix w{call[1], 1, size.in}, b{call[4], 1, branch.in};
    return multiply(size.rows, size.out, left, w, b, call[5][0], call[2], call[6]);
}

// dy (rows, out), W (out, in), dh (rows, rank), A (rank, in): dy W + dh A
KERNEL lora_backward(ARGUMENTS) {
    CALL;
    if (!call.floats(5)) return 1;
    for (int index = 0; index < 4; ++index)
        if (ndims[index] != 2) return 1;
    const int64_t rows = shapes[0][0], out = shapes[0][1], in = shapes[1][1], rank = shapes[2][1];
    if (shapes[1][0] != out || shapes[2][0] != rows || shapes[3][0] != rank || shapes[3][1] != in) return 1;
    if (call.size(4) != rows * in) return 1;
    const Left left{{call[0], out, 1}, out, {call[2], rank, 1}, rank};
    return multiply(rows, in, left, Matrix{call[1], in, 1}, Matrix{call[3], in, 1}, 1.0f, nullptr, call[4]);
}
