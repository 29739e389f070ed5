// Weights that were read from a file of 4 or 8 bits a weight, kept so beside their float32: a token that is generated
// reads every weight once, and memory is what it waits for.
//
// 32 weights of a row are a block, w = scale q + offset with q from 0 to 15 or to 255: Q4_0, Q4_1 and Q8_0 of GGUF.
// Blocks are found in the float32 weights; what does not come back to the last bit is not packed.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common.h"

namespace {

constexpr int64_t BLOCK = 32, HALF = BLOCK / 2;
constexpr int64_t MOST = 4;  // rows of x

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

// Weights (out, in) in blocks: bytes codes, and of each block scale and offset.
struct Packed {
    int64_t out, in;
    uint8_t *codes;  // 16 or 32 bytes a block
    float *factors;

    // The 32 weights of block `of`, in registers.
    template <int BYTES>
    void block(int64_t of, Lanes *to) const {
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

    // y (rows, out) = x (rows, in) W^T for columns [first, last).
    template <int BYTES, int ROWS>
    void multiply(const float *x, float *y, int64_t first, int64_t last) const {
        const int64_t blocks = in / BLOCK;
        for (int64_t j = first; j < last; ++j) {
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
                y[i * out + j] = sum;
            }
        }
    }

    template <int BYTES>
    void multiply(int64_t rows, const float *x, float *y, int64_t first, int64_t last) const {
        if (rows == 1) return multiply<BYTES, 1>(x, y, first, last);
        if (rows == 2) return multiply<BYTES, 2>(x, y, first, last);
        if (rows == 3) return multiply<BYTES, 3>(x, y, first, last);
        return multiply<BYTES, 4>(x, y, first, last);
    }

    // Writes the codes of a block, given its factors.
    template <int BYTES>
    void encode(int64_t of, const float *weights, float scale, float offset) const {
        factors[2 * of] = scale, factors[2 * of + 1] = offset;
        const float most = BYTES == HALF ? 15.0f : 255.0f;
        uint8_t each[BLOCK];
        for (int64_t i = 0; i < BLOCK; ++i) {
            const float level = scale == 0.0f ? 0.0f : std::nearbyint((weights[i] - offset) / scale);
            each[i] = static_cast<uint8_t>(level > 0.0f ? level < most ? level : most : 0.0f);
        }
        for (int64_t i = 0; i < BYTES; ++i)
            codes[of * BYTES + i] = BYTES == HALF ? each[i] | each[HALF + i] << 4 : each[i];
    }
};

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
bool is_block(const Packed &packed, int64_t of, const float *weights) {
    Lanes own[BLOCK / LANES];
    packed.block<BYTES>(of, own);
    Wide differs = {};
    for (int64_t i = 0; i < BLOCK; i += LANES) differs |= own[i / LANES] != load(weights + i);
    for (int64_t lane = 1; lane < LANES; ++lane) differs[0] |= differs[lane];
    return differs[0] == 0;
}

// Finds the scale and the offset of a block; whether it comes back to the last bit.
template <int BYTES>
bool pack_block(const Packed &packed, int64_t of, const float *weights) {
    float least = weights[0], most = weights[0], widest = weights[0];
    for (int64_t i = 0; i < BLOCK; ++i) {
        if (!std::isfinite(weights[i])) return false;
        least = weights[i] < least ? weights[i] : least;
        most = weights[i] > most ? weights[i] : most;
        widest = std::fabs(weights[i]) > std::fabs(widest) ? weights[i] : widest;
    }
    const auto fits = [&](float scale, float offset) {
        packed.encode<BYTES>(of, weights, scale, offset);
        return is_block<BYTES>(packed, of, weights);
    };
    if (BYTES == BLOCK) {  // Q8_0: the widest is 127 or -127 of its scale
        const float scale = as_half(std::fabs(widest) / 127.0f);
        return fits(scale, -128.0f * scale);
    }
    if (fits(as_half((most - least) / 15.0f), least)) return true;  // Q4_1: from the least on
    const float scale = as_half(widest / -8.0f);  // Q4_0: the widest is -8 of its scale
    return fits(scale, -8.0f * scale);
}

// work(packed, block, its weights) for every block until one returns false; whether all returned true.
template <class Work>
bool every_block(const Packed &packed, const float *weights, const Work &work) {
    std::atomic<bool> all{true};
    const int64_t blocks = packed.out * packed.in / BLOCK;
    each_piece(blocks, BLOCK, [&](int64_t first, int64_t last) {
        for (int64_t of = first; of < last && all; ++of)
            if (!work(packed, of, weights + of * BLOCK)) all = false;
    });
    return all;
}

}  // namespace

// ---- Not for MindSpore: W (out, in) into codes and factors, of `bytes` a block; 1 if W comes back from them, else 0
extern "C" int mindpet_pack(const float *weights, int64_t out, int64_t in, int64_t bytes, uint8_t *codes,
                            float *factors) {
    const Packed packed{out, in, codes, factors};
#if !defined(__AVX2__)
    return 0;  // a byte takes longer to spread out than a float to read
#endif
    return bytes == HALF ? every_block(packed, weights, pack_block<HALF>) : every_block(packed, weights, pack_block<BLOCK>);
}

// ---- the same, of codes and factors that are there: 1 if they are W, to the last bit but for the sign of a zero
extern "C" int mindpet_is_packed(const float *weights, int64_t out, int64_t in, int64_t bytes, uint8_t *codes,
                                 float *factors) {
    const Packed packed{out, in, codes, factors};
    return bytes == HALF ? every_block(packed, weights, is_block<HALF>) : every_block(packed, weights, is_block<BLOCK>);
}

// ---- x (rows, in) of a few rows, W (out, in), which is not read, codes (blocks, bytes), factors (blocks, 2): x W^T
KERNEL packed_forward(ARGUMENTS) {
    CALL;
    if (!call.are("ffuff") || ndims[0] != 2 || ndims[1] != 2) return 1;
    const int64_t rows = shapes[0][0], out = shapes[1][0], in = shapes[1][1], blocks = out * in / BLOCK;
    if (rows < 1 || rows > MOST || shapes[0][1] != in || in % BLOCK || call.size(4) != rows * out) return 1;
    const int64_t bytes = call.columns(2);
    if (bytes != HALF && bytes != BLOCK) return 1;
    if (call.size(2) != blocks * bytes || call.size(3) != 2 * blocks) return 1;
    const Packed packed{out, in, static_cast<uint8_t *>(params[2]), call[3]};
    const float *x = call[0];
    float *y = call[4];
    each_piece(out, in, [=](int64_t first, int64_t last) {
        if (bytes == HALF)
            packed.multiply<HALF>(rows, x, y, first, last);
        else
            packed.multiply<BLOCK>(rows, x, y, first, last);
    });
    return 0;
}
