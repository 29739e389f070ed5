// Kernels for the operators that dominate a training step on a CPU, in float32.
//
// Each is one pass over rows that stay in the cache. Results do not depend on the number of threads: a row is summed by
// one thread, and a sum over rows is cut into blocks whose number depends on the sizes only. To be compiled without
// -ffinite-math-only: NaN goes through, infinities have their limits.
#include "common.h"

int mindpet_wanted_threads = 0;
extern "C" void mindpet_threads(int count) { mindpet_wanted_threads = count; }

namespace {

constexpr int64_t ROW_BLOCKS = 32;  // partial sums of a sum over rows

// Distribution function of the standard normal distribution; `bell` becomes e^(-x^2/2). Absolute error 1e-7.
// The tail is e^(-x^2/2) t P(t) with t = 1 / (1 + 0.28 |x|): right to 1e-6 of itself as far as floats reach.
inline float normal_cdf(float x, float &bell) {
    const float t = 1.0f / (1.0f + 0.28f * std::fabs(x));
    bell = exp_of_negative(-0.5f * x * x);
    float p = 0.023615308f;
    p = p * t - 0.0887035f;
    p = p * t + 0.083657578f;
    p = p * t + 0.0017243511f;
    p = p * t + 0.068563148f;
    p = p * t + 0.084808744f;
    p = p * t + 0.1029221f;
    p = p * t + 0.11170854f;
    p = p * t + 0.11170378f;
    const float tail = bell * t * p;
    return x < 0.0f ? tail : 1.0f - tail;
}

// 1 / (1 + e^-x); `slope` becomes its derivative.
inline float sigmoid(float x, float &slope) {
    const float e = exp_of_negative(-std::fabs(x));
    const float upper = 1.0f / (1.0f + e);
    slope = e * upper * upper;
    return x < 0.0f ? e * upper : upper;
}

// a * b, and 0 where the factor b has vanished although a is infinite.
inline float damped(float a, float b) { return b == 0.0f ? 0.0f : a * b; }

inline float gelu(float x) {
    float bell;
    return damped(x, normal_cdf(x, bell));
}

inline float gelu_slope(float x) {
    float bell;
    const float cdf = normal_cdf(x, bell);
    return cdf + damped(x, bell * 0.39894228f);
}

// 2 sqrt(2/pi) (x + 0.044715 x^3): 0.5 (1 + tanh(u)) is sigmoid(2u).
inline float tanh_form(float x) { return 1.59576912f * (x + 0.044715f * x * x * x); }

inline float gelu_tanh(float x) {
    float slope;
    return damped(x, sigmoid(tanh_form(x), slope));
}

inline float gelu_tanh_slope(float x) {
    float slope;
    const float gate = sigmoid(tanh_form(x), slope);
    return gate + damped(x * (1.59576912f + 0.21406859f * x * x), slope);
}

inline float silu(float x) {
    float slope;
    return damped(x, sigmoid(x, slope));
}

inline float silu_slope(float x) {
    float slope;
    const float gate = sigmoid(x, slope);
    return gate + damped(x, slope);
}

// total[column] = the sum over rows; add(row, sums) adds one row to partial sums. Returns 0, or 1 without memory.
template <class Add>
int sum_over_rows(int64_t rows, int64_t columns, float *total, const Add &add) {
    const int64_t blocks = rows < ROW_BLOCKS ? 1 : ROW_BLOCKS;
    const std::unique_ptr<float[]> partial(new (std::nothrow) float[blocks * columns]());
    if (!partial) return 1;
    each_row(blocks, rows * columns / blocks, [&](int64_t block) {
        for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; ++row)
            add(row, partial.get() + block * columns);
    });
    for (int64_t column = 0; column < columns; ++column) {
        double sum = 0.0;
        for (int64_t block = 0; block < blocks; ++block) sum += partial[block * columns + column];
        total[column] = static_cast<float>(sum);
    }
    return 0;
}

template <float (*Function)(float)>
int map(const Call &call) {  // x, y
    if (!call.floats(2)) return 1;
    const float *x = call[0];
    float *y = call[1];
    each_piece(call.size(1), 1, [=](int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) y[i] = Function(x[i]);
    });
    return 0;
}

template <float (*Function)(float)>
int map_product(const Call &call) {  // x, factor, Function(x) factor
    if (!call.floats(3) || !call.per_entry(1)) return 1;
    const float *x = call[0], *factor = call[1];
    float *y = call[2];
    each_piece(call.size(2), 1, [=](int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) y[i] = factor[i] * Function(x[i]);
    });
    return 0;
}

// Mean and 1 / sqrt(variance + epsilon) of a row.
struct Moments {
    float mean, scale;
    Moments(const float *x, int64_t columns, float epsilon) {
        float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < columns; ++i) sum += x[i];
        const float center = sum / static_cast<float>(columns);
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < columns; ++i) squares += (x[i] - center) * (x[i] - center);
        mean = center;
        scale = 1.0f / std::sqrt(squares / static_cast<float>(columns) + epsilon);
    }
};

}  // namespace

// ---- GELU: x, y; and x, dy, dx
KERNEL gelu_forward(ARGUMENTS) { CALL; return map<gelu>(call); }
KERNEL gelu_backward(ARGUMENTS) { CALL; return map_product<gelu_slope>(call); }
KERNEL gelu_tanh_forward(ARGUMENTS) { CALL; return map<gelu_tanh>(call); }
KERNEL gelu_tanh_backward(ARGUMENTS) { CALL; return map_product<gelu_tanh_slope>(call); }

// ---- silu(gate) up: gate, up, y; gate, up, dy, d(gate); and gate, dy, d(up), which is the forward pass itself
KERNEL gated_silu_forward(ARGUMENTS) { CALL; return map_product<silu>(call); }
KERNEL gated_silu_backward(ARGUMENTS) {
    CALL;
    if (!call.floats(4) || !call.per_entry(1) || !call.per_entry(2)) return 1;
    const float *gate = call[0], *up = call[1], *dy = call[2];
    float *dx = call[3];
    each_piece(call.size(3), 1, [=](int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) dx[i] = dy[i] * up[i] * silu_slope(gate[i]);
    });
    return 0;
}

// ---- x (batch, n, heads, d), cos and sin (batch, n, 1, d): x cos + swap(x) sin, where swap exchanges the halves of d
namespace {
template <bool BACKWARD>  // dy cos + swap(dy sin)
int rotary(const Call &call) {
    if (!call.floats(4) || call.ndims[0] != 4 || call.ndims[1] != 4 || call.size(2) != call.size(1)) return 1;
    const int64_t *shape = call.shapes[0], heads = shape[2], size = shape[3], half = size / 2;
    if (size % 2 || call.size(1) != shape[0] * shape[1] * size || !call.per_entry(3)) return 1;
    const float *x = call[0], *cosines = call[1], *sines = call[2];
    float *y = call[3];
    each_row(shape[0] * shape[1] * heads, size, [=](int64_t row) {
        const float *cos = cosines + row / heads * size, *sin = sines + row / heads * size;
        turn(x + row * size, cos, BACKWARD ? sin + half : sin, BACKWARD ? sin : sin + half, y + row * size, half);
    });
    return 0;
}
}  // namespace
KERNEL rotary_forward(ARGUMENTS) { CALL; return rotary<false>(call); }
KERNEL rotary_backward(ARGUMENTS) { CALL; return rotary<true>(call); }

// ---- LayerNorm over the last axis: x, gamma, beta, epsilon, y
KERNEL layer_norm_forward(ARGUMENTS) {
    CALL;
    if (!call.floats(5) || !call.per_column(1) || !call.per_column(2)) return 1;
    const int64_t columns = call.columns(0);
    const float *x = call[0], *gamma = call[1], *beta = call[2];
    const float epsilon = *call[3];
    float *y = call[4];
    each_row(call.rows(0), columns, [=](int64_t row) {
        const float *in = x + row * columns;
        float *out = y + row * columns;
        const Moments moments(in, columns, epsilon);
        const float mean = moments.mean, scale = moments.scale;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[i] = (in[i] - mean) * scale * gamma[i] + beta[i];
    });
    return 0;
}

// x, gamma, epsilon, dy, dx
KERNEL layer_norm_backward(ARGUMENTS) {
    CALL;
    if (!call.floats(5) || !call.per_column(1) || !call.per_entry(3)) return 1;
    const int64_t columns = call.columns(0);
    const float *x = call[0], *gamma = call[1], *dy = call[3];
    const float epsilon = *call[2];
    float *dx = call[4];
    each_row(call.rows(0), columns, [=](int64_t row) {
        const float *in = x + row * columns, *grad = dy + row * columns;
        float *out = dx + row * columns;
        const Moments moments(in, columns, epsilon);
        const float mean = moments.mean, scale = moments.scale;
        float sum = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum, dot)
        for (int64_t i = 0; i < columns; ++i) {
            const float g = grad[i] * gamma[i];
            sum += g;
            dot += g * ((in[i] - mean) * scale);
        }
        const float mean_g = sum / static_cast<float>(columns), mean_dot = dot / static_cast<float>(columns);
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i)
            out[i] = scale * (grad[i] * gamma[i] - mean_g - (in[i] - mean) * scale * mean_dot);
    });
    return 0;
}

// x, epsilon, dy, d(gamma)
KERNEL layer_norm_backward_gamma(ARGUMENTS) {
    CALL;
    if (!call.floats(4) || !call.per_entry(2)) return 1;
    const int64_t columns = call.columns(0);
    const float *x = call[0], *dy = call[2];
    const float epsilon = *call[1];
    return sum_over_rows(call.rows(0), columns, call[3], [=](int64_t row, float *sums) {
        const float *in = x + row * columns, *grad = dy + row * columns;
        const Moments moments(in, columns, epsilon);
        const float mean = moments.mean, scale = moments.scale;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) sums[i] += grad[i] * ((in[i] - mean) * scale);
    });
}

// dy, d(beta)
KERNEL sum_of_rows(ARGUMENTS) {
    CALL;
    if (!call.floats(2) || call.size(1) != call.columns(0)) return 1;
    const int64_t columns = call.columns(0);
    const float *dy = call[0];
    return sum_over_rows(call.rows(0), columns, call[1], [=](int64_t row, float *sums) {
        const float *grad = dy + row * columns;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) sums[i] += grad[i];
    });
}

// ---- the sum of x^2: x, (1,)
KERNEL square_sum(ARGUMENTS) {
    CALL;
    if (!call.floats(2) || call.size(1) != 1) return 1;
    const float *x = call[0];
    const int64_t size = call.size(0), blocks = size <= SMALL ? 1 : ROW_BLOCKS;
    double partial[ROW_BLOCKS];
    each_row(blocks, size / blocks, [&](int64_t block) {
        double total = 0.0;
        const int64_t step = 1024, last = size * (block + 1) / blocks;  // few enough for a float
        for (int64_t begin = size * block / blocks; begin < last; begin += step) {
            const int64_t end = begin + step < last ? begin + step : last;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = begin; i < end; ++i) sum += x[i] * x[i];
            total += sum;
        }
        partial[block] = total;
    });
    double total = 0.0;
    for (int64_t block = 0; block < blocks; ++block) total += partial[block];
    call[1][0] = static_cast<float>(total);
    return 0;
}

// ---- RMSNorm over the last axis: x, weight, epsilon, y
KERNEL rms_norm_forward(ARGUMENTS) {
    CALL;
    if (!call.floats(4) || !call.per_column(1)) return 1;
    const int64_t columns = call.columns(0);
    const float *x = call[0], *weight = call[1];
    const float epsilon = *call[2];
    float *y = call[3];
    each_row(call.rows(0), columns, [=](int64_t row) {
        rms_norm(x + row * columns, weight, epsilon, y + row * columns, columns);
    });
    return 0;
}

// x, weight, epsilon, dy, dx
KERNEL rms_norm_backward(ARGUMENTS) {
    CALL;
    if (!call.floats(5) || !call.per_column(1) || !call.per_entry(3)) return 1;
    const int64_t columns = call.columns(0);
    const float *x = call[0], *weight = call[1], *dy = call[3];
    const float epsilon = *call[2];
    float *dx = call[4];
    each_row(call.rows(0), columns, [=](int64_t row) {
        const float *in = x + row * columns, *grad = dy + row * columns;
        float *out = dx + row * columns;
        const float scale = inverse_rms(in, columns, epsilon);
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < columns; ++i) dot += grad[i] * weight[i] * (in[i] * scale);
        const float mean_dot = dot / static_cast<float>(columns);
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[i] = scale * (grad[i] * weight[i] - in[i] * scale * mean_dot);
    });
    return 0;
}

// x, epsilon, dy, d(weight)
KERNEL rms_norm_backward_weight(ARGUMENTS) {
    CALL;
    if (!call.floats(4) || !call.per_entry(2)) return 1;
    const int64_t columns = call.columns(0);
    const float *x = call[0], *dy = call[2];
    const float epsilon = *call[1];
    return sum_over_rows(call.rows(0), columns, call[3], [=](int64_t row, float *sums) {
        const float *in = x + row * columns, *grad = dy + row * columns;
        const float scale = inverse_rms(in, columns, epsilon);
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) sums[i] += grad[i] * (in[i] * scale);
    });
}

// ---- softmax over the last axis of scores + mask: scores (a, b, c, columns), mask (a or 1, b or 1, c or 1, columns), y
KERNEL masked_softmax_forward(ARGUMENTS) {
    CALL;
    if (!call.floats(3) || ndims[0] != 4 || ndims[1] != 4) return 1;
    const int64_t *shape = shapes[0];
    const MaskSteps steps(shapes[1], shape);
    if (!steps.fit) return 1;
    const int64_t columns = shape[3], b = shape[1], c = shape[2];
    const float *scores = call[0], *mask = call[1];
    float *y = call[2];
    each_row(call.rows(0), columns, [=](int64_t row) {
        const float *in = scores + row * columns;
        const float *add = mask + steps.to(row / (b * c), row / c % b, row % c);
        float *out = y + row * columns;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[i] = in[i] + add[i];
        softmax_row(out, columns);
    });
    return 0;
}

// y, dy, d(scores)
KERNEL softmax_backward(ARGUMENTS) {
    CALL;
    if (!call.floats(3) || !call.per_entry(1)) return 1;
    const int64_t columns = call.columns(0);
    const float *y = call[0], *dy = call[1];
    float *dx = call[2];
    each_row(call.rows(0), columns, [=](int64_t row) {
        const float *probability = y + row * columns, *grad = dy + row * columns;
        float *out = dx + row * columns;
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < columns; ++i) dot += probability[i] * grad[i];
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[i] = probability[i] * (grad[i] - dot);
    });
    return 0;
}

// ---- cross entropy of rows of logits: logits (rows, classes), labels (rows,), losses (rows,)
// A negative label is ignored: its loss and gradient are 0. A label of no class gives NaN.
KERNEL cross_entropy_forward(ARGUMENTS) {
    CALL;
    if (!call.floats(3, 1) || !call.per_row(1)) return 1;
    const int64_t columns = call.columns(0);
    const float *logits = call[0];
    const int32_t *labels = static_cast<const int32_t *>(params[1]);
    float *losses = call[2];
    each_row(call.rows(0), columns, [=](int64_t row) {
        const int32_t label = labels[row];
        if (label < 0 || label >= columns) {
            losses[row] = label < 0 ? 0.0f : NAN;
            return;
        }
        const float *in = logits + row * columns;
        const float top = largest(in, columns);
        losses[row] = std::log(sum_of_exponentials(in, columns, top)) + (top - in[label]);
    });
    return 0;
}

// logits, labels, d(losses), d(logits)
KERNEL cross_entropy_backward(ARGUMENTS) {
    CALL;
    if (!call.floats(4, 1) || !call.per_row(1) || !call.per_row(2)) return 1;
    const int64_t columns = call.columns(0);
    const float *logits = call[0], *dy = call[2];
    const int32_t *labels = static_cast<const int32_t *>(params[1]);
    float *dx = call[3];
    each_row(call.rows(0), columns, [=](int64_t row) {
        const int32_t label = labels[row];
        const float *in = logits + row * columns;
        float *out = dx + row * columns;
        if (label < 0 || label >= columns) {
            const float value = label < 0 ? 0.0f : NAN;
            for (int64_t i = 0; i < columns; ++i) out[i] = value;
            return;
        }
        const float factor = dy[row] / exponentials(in, out, columns, largest(in, columns));
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[i] *= factor;
        out[label] -= dy[row];
    });
    return 0;
}

// ---- dropout, and its gradient: x (..., columns), words (int32), keys (int32, 4), factor of what is kept, y
KERNEL dropout_apply(ARGUMENTS) {
    CALL;
    if (!call.are("fiiff") || call.size(2) != 4) return 1;
    const int64_t columns = call.columns(0), rows = call.rows(0);
    const Dropout mask(params[1], call.size(1), params[2], rows);
    if (!mask.fits(rows, columns)) return 1;
    const float *x = call[0];
    const float kept = *call[3];
    float *y = call[4];
    each_row(rows, columns, [=](int64_t row) {
        const float *in = x + row * columns;
        float *out = y + row * columns;
        mask.factors(row, columns, kept, out);
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[i] *= in[i];
    });
    return 0;
}
