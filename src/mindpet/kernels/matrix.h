// Weights that a few rows are multiplied with, which reads each of them once: floats, or fewer bytes that say the same.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common.h"

namespace mindpet {

constexpr int64_t BLOCK = 32, HALF = BLOCK / 2, PLAIN = 4 * BLOCK;

typedef int32_t Wide __attribute__((vector_size(LANES * 4)));

// LANES bytes as integers, and those as floats. Compilers take the bytes apart one by one where they are not told how.
inline Wide widened(const uint8_t *from) {
#if defined(__AVX512F__)
    return reinterpret_cast<Wide>(
        _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
#elif defined(__AVX2__)
    return reinterpret_cast<Wide>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from))));
#else
    Wide wide;
    for (int64_t i = 0; i < LANES; ++i) wide[i] = from[i];
    return wide;
#endif
}

inline Lanes as_floats(Wide wide) {
#if defined(__AVX512F__)
    return reinterpret_cast<Lanes>(_mm512_maskz_cvtepi32_ps(0xffff, reinterpret_cast<__m512i>(wide)));
#elif defined(__AVX2__)
    return reinterpret_cast<Lanes>(_mm256_cvtepi32_ps(reinterpret_cast<__m256i>(wide)));
#else
    Lanes lanes;
    for (int64_t i = 0; i < LANES; ++i) lanes[i] = static_cast<float>(wide[i]);
    return lanes;
#endif
}

// Weights (out, in) in blocks of a row: codes, and of each block scale and offset; or as they are, and no factors.
struct Matrix {
    int64_t out, in, bytes;  // 16 or 32 a block; 128 as they are
    uint8_t *codes;
    float *factors;

    Matrix(int64_t out, int64_t in, int64_t bytes, uint8_t *codes, float *factors)
        : out(out), in(in), bytes(bytes), codes(codes), factors(factors) {}

    // From the parameters `at` and after it: codes and factors, or W and anything; what does not fit has no rows.
    Matrix(const Call &call, int at, int64_t in)
        : out(0), in(in), bytes(call.columns(at)), codes(static_cast<uint8_t *>(call.params[at])), factors(call[at + 1]) {
        if (in < 1 || in % BLOCK) return;
        const int64_t blocks = call.rows(at), each = in / BLOCK;
        if (std::strcmp(call.dtypes[at], "float32") == 0) {
            if (bytes == in) out = blocks;
            bytes = PLAIN;
        } else if ((bytes == HALF || bytes == BLOCK) && blocks % each == 0 && call.size(at + 1) == 2 * blocks) {
            out = blocks / each;
        }
    }

    // The 32 weights of block `of`, in registers.
    template <int BYTES>
    void block(int64_t of, Lanes *to) const {
        if (BYTES == PLAIN) {
            const float *from = reinterpret_cast<const float *>(codes) + of * BLOCK;
            for (int64_t i = 0; i < BLOCK; i += LANES) to[i / LANES] = load(from + i);
            return;
        }
        const float scale = factors[2 * of], offset = factors[2 * of + 1];
        const uint8_t *from = codes + of * BYTES;
        for (int64_t i = 0; i < BYTES; i += LANES) {
            const Wide levels = widened(from + i);
            if (BYTES == BLOCK) {
                to[i / LANES] = as_floats(levels) * scale + offset;
            } else {  // weight i and weight i + 16 share a byte
                to[i / LANES] = as_floats(levels & 15) * scale + offset;
                to[(HALF + i) / LANES] = as_floats(levels >> 4) * scale + offset;
            }
        }
    }

    // The products of rows of x (rows, in) with row j of W.
    template <int BYTES, int ROWS>
    void dot(const float *x, int64_t j, float *products) const {
        const int64_t blocks = in / BLOCK;
        Lanes sums[ROWS][2] = {};
        for (int64_t k = 0; k < blocks; ++k) {
            Lanes weights[BLOCK / LANES];
            block<BYTES>(j * blocks + k, weights);
            for (int i = 0; i < ROWS; ++i)
                for (int64_t part = 0; part < BLOCK / LANES; ++part)
                    sums[i][part & 1] += weights[part] * load(x + i * in + k * BLOCK + part * LANES);
        }
        for (int i = 0; i < ROWS; ++i) {
            float lanes[LANES], sum = 0.0f;
            store(lanes, sums[i][0] + sums[i][1]);
#pragma omp simd reduction(+ : sum)
            for (int64_t lane = 0; lane < LANES; ++lane) sum += lanes[lane];
            products[i] = sum;
        }
    }

    typedef void (Matrix::*Dot)(const float *x, int64_t j, float *products) const;

    Dot dot_of(int64_t rows) const {
        return bytes == HALF ? dot_of<HALF>(rows) : bytes == BLOCK ? dot_of<BLOCK>(rows) : dot_of<PLAIN>(rows);
    }

    template <int BYTES>
    static Dot dot_of(int64_t rows) {
        static constexpr Dot all[] = {&Matrix::dot<BYTES, 1>, &Matrix::dot<BYTES, 2>, &Matrix::dot<BYTES, 3>,
                                      &Matrix::dot<BYTES, 4>};
        return all[rows - 1];
    }

    // y (rows, out) = x (rows, in) W^T for columns [first, last), plus what y is to begin with, if anything.
    void multiply(int64_t rows, const float *x, float *y, int64_t first, int64_t last, const float *begin) const {
        const Dot products = dot_of(rows);
        float sums[FEW];
        for (int64_t j = first; j < last; ++j) {
            (this->*products)(x, j, sums);
            for (int64_t i = 0; i < rows; ++i) y[i * out + j] = begin ? begin[i * out + j] + sums[i] : sums[i];
        }
    }
};

inline bool few(int64_t rows) { return rows >= 1 && rows <= FEW; }

}  // namespace mindpet
