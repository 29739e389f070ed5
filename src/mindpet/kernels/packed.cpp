// Weights that were read from a file of 4 or 8 bits a weight, kept so beside their float32: a token that is generated
// reads every weight once, and memory is what it waits for.
//
// 32 weights of a row are a block, w = scale q + offset with q from 0 to 15 or to 255: Q4_0, Q4_1 and Q8_0 of GGUF.
// Blocks are found in the float32 weights; what does not come back to the last bit is not packed.
#include "matrix.h"

namespace {

// Writes the codes of a block, given its factors.
template <int BYTES>
void encode(const Matrix &matrix, int64_t of, const float *weights, float scale, float offset) {
    matrix.factors[2 * of] = scale, matrix.factors[2 * of + 1] = offset;
    const float most = BYTES == HALF ? 15.0f : 255.0f;
    uint8_t each[BLOCK];
    for (int64_t i = 0; i < BLOCK; ++i) {
        const float level = scale == 0.0f ? 0.0f : std::nearbyint((weights[i] - offset) / scale);
        each[i] = static_cast<uint8_t>(level > 0.0f ? level < most ? level : most : 0.0f);
    }
    for (int64_t i = 0; i < BYTES; ++i)
        matrix.codes[of * BYTES + i] = BYTES == HALF ? each[i] | each[HALF + i] << 4 : each[i];
}

// The half-precision number next to x, which is where the scales of such files come from; x where there is none.
float as_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t size = bits & 0x7fffffffu;
    if (size < 0x38800000u) return std::nearbyint(x * 16777216.0f) / 16777216.0f;  // multiples of 2^-24
    if (size > 0x477fe000u) return x;
    const uint32_t rounded = (bits + 0xfffu + (bits >> 13 & 1)) & ~0x1fffu;
    float half;
    std::memcpy(&half, &rounded, 4);
    return half;
}

// Whether block `of` is these weights, to the last bit but for the sign of a zero.
template <int BYTES>
bool is_block(const Matrix &matrix, int64_t of, const float *weights) {
    Lanes own[BLOCK / LANES];
    matrix.block<BYTES>(of, own);
    Wide differs = {};
    for (int64_t i = 0; i < BLOCK; i += LANES) differs |= own[i / LANES] != load(weights + i);
    for (int64_t lane = 1; lane < LANES; ++lane) differs[0] |= differs[lane];
    return differs[0] == 0;
}

// Finds the scale and the offset of a block; whether it comes back to the last bit.
template <int BYTES>
bool pack_block(const Matrix &matrix, int64_t of, const float *weights) {
    float least = weights[0], most = weights[0], widest = weights[0];
    for (int64_t i = 0; i < BLOCK; ++i) {
        if (!std::isfinite(weights[i])) return false;
        least = weights[i] < least ? weights[i] : least;
        most = weights[i] > most ? weights[i] : most;
        widest = std::fabs(weights[i]) > std::fabs(widest) ? weights[i] : widest;
    }
    const auto fits = [&](float scale, float offset) {
        encode<BYTES>(matrix, of, weights, scale, offset);
        return is_block<BYTES>(matrix, of, weights);
    };
    if (BYTES == BLOCK) {  // Q8_0: the widest is 127 or -127 of its scale
        const float scale = as_half(std::fabs(widest) / 127.0f);
        return fits(scale, -128.0f * scale);
    }
    if (fits(as_half((most - least) / 15.0f), least)) return true;  // Q4_1: from the least on
    const float scale = as_half(widest / -8.0f);  // Q4_0: the widest is -8 of its scale
    return fits(scale, -8.0f * scale);
}

// work(matrix, block, its weights) for every block until one returns false; whether all returned true.
template <class Work>
bool every_block(const Matrix &matrix, const float *weights, const Work &work) {
    std::atomic<bool> all{true};
    const int64_t blocks = matrix.out * matrix.in / BLOCK;
    each_piece(blocks, BLOCK, [&](int64_t first, int64_t last) {
        for (int64_t of = first; of < last && all; ++of)
            if (!work(matrix, of, weights + of * BLOCK)) all = false;
    });
    return all;
}

}  // namespace

// ---- Not for MindSpore: W (out, in) into codes and factors, of `bytes` a block; 1 if W comes back from them, else 0
extern "C" int mindpet_pack(const float *weights, int64_t out, int64_t in, int64_t bytes, uint8_t *codes,
                            float *factors) {
    const Matrix matrix(out, in, bytes, codes, factors);
#if !defined(__AVX2__)
    return 0;  // a byte takes longer to spread out than a float to read
#endif
    return bytes == HALF ? every_block(matrix, weights, pack_block<HALF>) : every_block(matrix, weights, pack_block<BLOCK>);
}

// ---- the same, of codes and factors that are there: 1 if they are W, to the last bit but for the sign of a zero
extern "C" int mindpet_is_packed(const float *weights, int64_t out, int64_t in, int64_t bytes, uint8_t *codes,
                                 float *factors) {
    const Matrix matrix(out, in, bytes, codes, factors);
    return bytes == HALF ? every_block(matrix, weights, is_block<HALF>) : every_block(matrix, weights, is_block<BLOCK>);
}

// ---- x (rows, in) of a few rows, W (out, in), which is not read, codes (blocks, bytes), factors (blocks, 2): x W^T
KERNEL packed_forward(ARGUMENTS) {
    CALL;
    if (!call.are("ffuff") || call.ndims[0] != 2 || call.ndims[1] != 2) return 1;
    const int64_t rows = call.rows(0);
    const Matrix matrix(call, 2, call.columns(0));
    if (!few(rows) || shapes[1][0] != matrix.out || shapes[1][1] != matrix.in) return 1;
    if (call.size(4) != rows * matrix.out) return 1;
    const float *x = call[0];
    float *y = call[4];
    each_piece(matrix.out, matrix.in, [=](int64_t first, int64_t last) {
        matrix.multiply(rows, x, y, first, last, nullptr);
    });
    return 0;
}
