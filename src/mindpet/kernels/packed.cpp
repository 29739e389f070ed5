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

constexpr int64_t BLOCK = 32, HALF = BLOCK / 2, PLAIN = 4 * BLOCK;
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

// Weights (out, in) in blocks: codes, and of each block scale and offset.
struct Packed {
    int64_t out, in, bytes;  // 16 or 32 a block, or 128: floats in the place of codes
    uint8_t *codes;
    float *factors;

    Packed(int64_t out, int64_t in, int64_t bytes, uint8_t *codes, float *factors)
        : out(out), in(in), bytes(bytes), codes(codes), factors(factors) {}

    // From the parameters `at` and after it: codes and factors, or W and anything; what does not fit has no rows.
    Packed(const Call &call, int at, int64_t in)
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

    typedef void (Packed::*Dot)(const float *x, int64_t j, float *products) const;

    Dot dot_of(int64_t rows) const {
        return bytes == HALF ? dot_of<HALF>(rows) : bytes == BLOCK ? dot_of<BLOCK>(rows) : dot_of<PLAIN>(rows);
    }

    template <int BYTES>
    static Dot dot_of(int64_t rows) {
        static constexpr Dot all[] = {&Packed::dot<BYTES, 1>, &Packed::dot<BYTES, 2>, &Packed::dot<BYTES, 3>,
                                      &Packed::dot<BYTES, 4>};
        return all[rows - 1];
    }

    // y (rows, out) = x (rows, in) W^T for columns [first, last), plus what y is to begin with, if anything.
    void multiply(int64_t rows, const float *x, float *y, int64_t first, int64_t last, const float *begin) const {
        const Dot products = dot_of(rows);
        float sums[MOST];
        for (int64_t j = first; j < last; ++j) {
            (this->*products)(x, j, sums);
            for (int64_t i = 0; i < rows; ++i) y[i * out + j] = begin ? begin[i * out + j] + sums[i] : sums[i];
        }
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

bool few(int64_t rows) { return rows >= 1 && rows <= MOST; }

// The RMSNorm of the first parameter with the weight and the epsilon of the next two, in this thread's memory; or null.
const float *normalised(const Call &call) {
    const int64_t rows = call.rows(0), columns = call.columns(0);
    float *y = call.size(2) == 1 ? scratch.room(rows * columns) : nullptr;
    for (int64_t row = 0; y && row < rows; ++row) rms_norm(call[0] + row * columns, call[1], *call[2], y + row * columns, columns);
    return y;
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
    const Packed packed(out, in, bytes, codes, factors);
#if !defined(__AVX2__)
    return 0;  // a byte takes longer to spread out than a float to read
#endif
    return bytes == HALF ? every_block(packed, weights, pack_block<HALF>) : every_block(packed, weights, pack_block<BLOCK>);
}

// ---- the same, of codes and factors that are there: 1 if they are W, to the last bit but for the sign of a zero
extern "C" int mindpet_is_packed(const float *weights, int64_t out, int64_t in, int64_t bytes, uint8_t *codes,
                                 float *factors) {
    const Packed packed(out, in, bytes, codes, factors);
    return bytes == HALF ? every_block(packed, weights, is_block<HALF>) : every_block(packed, weights, is_block<BLOCK>);
}

// ---- x (rows, in) of a few rows, W (out, in), which is not read, codes (blocks, bytes), factors (blocks, 2): x W^T
KERNEL packed_forward(ARGUMENTS) {
    CALL;
    if (!call.are("ffwff") || call.ndims[0] != 2 || call.ndims[1] != 2) return 1;
    const int64_t rows = call.rows(0);
    const Packed packed(call, 2, call.columns(0));
    if (!few(rows) || shapes[1][0] != packed.out || shapes[1][1] != packed.in) return 1;
    if (call.size(4) != rows * packed.out) return 1;
    const float *x = call[0];
    float *y = call[4];
    each_piece(packed.out, packed.in, [=](int64_t first, int64_t last) {
        packed.multiply(rows, x, y, first, last, nullptr);
    });
    return 0;
}

// ---- the same, added to what there is: x (rows, in), codes, factors, residual (rows, out): residual + x W^T
KERNEL packed_onto(ARGUMENTS) {
    CALL;
    if (!call.are("fwfff")) return 1;
    const int64_t rows = call.rows(0);
    const Packed packed(call, 1, call.columns(0));
    if (!few(rows) || !packed.out || call.size(3) != rows * packed.out || call.size(4) != call.size(3)) return 1;
    const float *x = call[0], *begin = call[3];
    float *y = call[4];
    each_piece(packed.out, packed.in, [=](int64_t first, int64_t last) {
        packed.multiply(rows, x, y, first, last, begin);
    });
    return 0;
}

// ---- x (rows, in), weight and epsilon of an RMSNorm, codes and factors of three W: n W^T of each, with n the norm of x
KERNEL packed_three(ARGUMENTS) {
    CALL;
    if (!call.are("fffwfwfwffff") || !call.per_column(1)) return 1;
    const int64_t rows = call.rows(0), in = call.columns(0);
    const Packed packed[] = {{call, 3, in}, {call, 5, in}, {call, 7, in}};
    for (int each = 0; each < 3; ++each)
        if (!packed[each].out || call.size(9 + each) != rows * packed[each].out) return 1;
    const float *x = few(rows) ? normalised(call) : nullptr;
    if (!x) return 1;
    each_piece(packed[0].out + packed[1].out + packed[2].out, in, [&](int64_t first, int64_t last) {
        for (int each = 0; each < 3; ++each) {
            const int64_t out = packed[each].out, begin = first > 0 ? first : 0, end = last < out ? last : out;
            packed[each].multiply(rows, x, call[9 + each], begin, end, nullptr);
            first -= out, last -= out;
        }
    });
    return 0;
}

// ---- x (rows, in), weight and epsilon of an RMSNorm, codes and factors of G and U: silu(n G^T) (n U^T), n the norm of x
KERNEL packed_gated(ARGUMENTS) {
    CALL;
    if (!call.are("fffwfwff") || !call.per_column(1)) return 1;
    const int64_t rows = call.rows(0), in = call.columns(0);
    const Packed gate(call, 3, in), up(call, 5, in);
    if (!gate.out || up.out != gate.out || call.size(7) != rows * gate.out) return 1;
    const float *x = few(rows) ? normalised(call) : nullptr;
    if (!x) return 1;
    float *y = call[7];
    each_piece(gate.out, 2 * in, [&](int64_t first, int64_t last) {
        const Packed::Dot of_gate = gate.dot_of(rows), of_up = up.dot_of(rows);
        float gates[MOST], ups[MOST];
        for (int64_t j = first; j < last; ++j) {
            (gate.*of_gate)(x, j, gates);
            (up.*of_up)(x, j, ups);
            for (int64_t i = 0; i < rows; ++i) y[i * gate.out + j] = gates[i] / (1.0f + std::exp(-gates[i])) * ups[i];
        }
    });
    return 0;
}
