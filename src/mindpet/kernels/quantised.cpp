// Products with a weight that is kept as codes (mindpet/delta/blockwise.py): x W^T, and dy W, its gradient with respect
// to x. The weight is decoded while it is packed for the product, or a row at a time where x has few rows, and is
// nowhere in memory as a whole but there.
#include "product.h"

namespace {

constexpr int64_t GROUP = 256;  // blocks whose largest values have one scale
constexpr int64_t DECODED = 128;  // entries of a row at a time, while a panel is packed

// codes (uint8), absmax (of each block: float32, or uint8 in whole groups), scales, offset, table (256, entries of a
// byte), levels (256: what a uint8 of absmax stands for), sizes (int32: out, in, block).
struct Weight {
    int64_t out = 0, in = 0, block = 0, each = 0;
    const uint8_t *codes;
    const uint8_t *coded = nullptr;   // the one or the other
    const float *absmax = nullptr;
    const float *scales, *offset, *table, *levels;
    bool fits = false;

    Weight(const Call &call, int first) {
        if (call.size(first + 6) != 3) return;
        const int32_t *sizes = static_cast<const int32_t *>(call.params[first + 6]);
        out = sizes[0], in = sizes[1], block = sizes[2];
        each = call.columns(first + 4);
        if (out < 1 || in < 1 || block < 1 || each < 1 || each > 2 || block % each) return;
        if (call.rows(first + 4) != 256 || call.size(first + 5) != 256 || call.size(first + 3) != 1) return;
        const int64_t blocks = (out * in + block - 1) / block;
        if (call.size(first) * each != blocks * block) return;
        const int64_t kept = call.size(first + 1);
        if (std::strcmp(call.dtypes[first + 1], "uint8") == 0) {
            coded = static_cast<const uint8_t *>(call.params[first + 1]);
            if (kept < blocks || kept != GROUP * call.size(first + 2)) return;
        } else {
            absmax = call[first + 1];
            if (kept != blocks) return;
        }
        codes = static_cast<const uint8_t *>(call.params[first]);
        scales = call[first + 2], offset = call[first + 3], table = call[first + 4], levels = call[first + 5];
        fits = true;
    }

    // What the levels of a block are multiplied by.
    float scale(int64_t of) const {
        if (absmax) return absmax[of];
        const volatile float product = levels[coded[of]] * scales[of / GROUP];  // rounded, as MindSpore's operators do
        return product + *offset;
    }

    // `count` entries from the entry `first` of the weight, over the ends of rows and blocks.
    void read(int64_t first, int64_t count, float *to) const {
        const int64_t last = first + count;
        while (first < last) {
            const int64_t of = first / block, end = (of + 1) * block < last ? (of + 1) * block : last;
            const float factor = scale(of);
            if (each == 1) {
                for (; first < end; ++first) *to++ = table[codes[first]] * factor;
                continue;
            }
            if (first & 1) *to++ = table[2 * codes[first++ / 2] + 1] * factor;
            const uint8_t *code = codes + first / 2;
            for (; first + 2 <= end; first += 2, to += 2) {
                const float *pair = table + 2 * *code++;
                to[0] = pair[0] * factor;
                to[1] = pair[1] * factor;
            }
            if (first < end) *to++ = table[2 * codes[first++ / 2]] * factor;
        }
    }

    // Panel (deep, PANEL) of W^T, its rows from `from` and its columns from `first` on.
    void pack_rows(int64_t first, int64_t from, int64_t deep, float *panel) const {
        float decoded[PANEL][DECODED];
        const int64_t width = out - first < PANEL ? out - first : PANEL;
        for (int64_t begin = from; begin < from + deep; begin += DECODED) {
            const int64_t part = from + deep - begin < DECODED ? from + deep - begin : DECODED;
            for (int64_t j = 0; j < width; ++j) read((first + j) * in + begin, part, decoded[j]);
            pack_panel(Matrix{&decoded[0][0], 1, DECODED}, part, width, 0, panel + (begin - from) * PANEL);
        }
    }

    // Panel (deep, PANEL) of W, its rows from `from` and its columns from `first` on.
    void pack_columns(int64_t first, int64_t from, int64_t deep, float *panel) const {
        const int64_t width = in - first < PANEL ? in - first : PANEL;
        for (int64_t k = from; k < from + deep; ++k, panel += PANEL) {
            read(k * in + first, width, panel);
            for (int64_t j = width; j < PANEL; ++j) panel[j] = 0.0f;
        }
    }
};

// x W^T for a few rows, each row of the weight decoded once.
int multiply_few(const Weight &weight, int64_t rows, const float *x, float *y) {
    std::atomic<bool> failed{false};
    const int64_t in = weight.in, out = weight.out;
    each_piece(out, in, [&, in, out](int64_t first, int64_t last) {
        float *row = scratch.room(in);
        if (!row) {
            failed = true;
            return;
        }
        for (int64_t j = first; j < last; ++j) {
            weight.read(j * in, in, row);
            for (int64_t i = 0; i < rows; ++i) {
                const float *left = x + i * in;
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (int64_t k = 0; k < in; ++k) sum += left[k] * row[k];
                y[i * out + j] = sum;
            }
        }
    });
    return failed ? 1 : 0;
}

bool takes(const Call &call) { return call.are("fufffffif") || call.are("fuuffffif"); }

}  // namespace

// ---- x (rows, in), the weight (see above), x W^T
KERNEL quantised_forward(ARGUMENTS) {
    CALL;
    if (!takes(call) || ndims[0] != 2) return 1;
    const Weight weight(call, 1);
    const int64_t rows = shapes[0][0];
    if (!weight.fits || shapes[0][1] != weight.in || call.size(8) != rows * weight.out) return 1;
    if (rows < STRIP) return multiply_few(weight, rows, call[0], call[8]);
    const auto pack = [&](int64_t first, int64_t from, int64_t deep, float *panel) {
        weight.pack_rows(first, from, deep, panel);
    };
    return multiply(rows, weight.out, Left{{call[0], weight.in, 1}, weight.in}, pack, nullptr, call[8]);
}

// ---- dy (rows, out), the weight (see above), dy W
KERNEL quantised_backward(ARGUMENTS) {
    CALL;
    if (!takes(call) || ndims[0] != 2) return 1;
    const Weight weight(call, 1);
    const int64_t rows = shapes[0][0];
    if (!weight.fits || shapes[0][1] != weight.out || call.size(8) != rows * weight.in) return 1;
    const auto pack = [&](int64_t first, int64_t from, int64_t deep, float *panel) {
        weight.pack_columns(first, from, deep, panel);
    };
    return multiply(rows, weight.in, Left{{call[0], weight.out, 1}, weight.out}, pack, nullptr, call[8]);
}
