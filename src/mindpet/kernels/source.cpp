// Kernels for the operators that dominate a training step on a CPU, in float32.
//
// Every exported function has the signature of an ahead-of-time Custom operator: `params` holds the inputs and then the
// one output, `shapes` and `ndims` their sizes. It returns 0, or 1 for arguments it does not take.
//
// Each is one pass over rows that stay in the cache. Results do not depend on the number of threads: a row is summed by
// one thread, and a sum over rows is cut into blocks whose number depends on the sizes only. To be compiled without
// -ffinite-math-only: NaN goes through, infinities have their limits.
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#define KERNEL extern "C" int
#define ARGUMENTS int count, void **params, int *ndims, int64_t **shapes, const char **dtypes, void *, void *

namespace {

constexpr int64_t CHUNK = 8192;     // elements that a thread takes at a time
constexpr int64_t SMALL = 65536;    // elements below which waking other threads costs more than it saves
constexpr int64_t ROW_BLOCKS = 32;  // partial sums of a sum over rows

// Threads that sleep between two kernels. OpenMP's would go on spinning for a while and take the processor away from
// the matrix product that follows. A thread that does not wake up in time is not waited for: whoever is awake takes the
// next chunk. A second kernel at the same time runs on its caller's thread alone, and so does every kernel of a process
// that was forked: it has none of the threads, and mutexes and condition variables as they stood at that moment.
class Pool {
public:
    static Pool &instance() {
        static Pool *pool = new Pool;  // never destroyed: its threads sleep until the process ends
        return *pool;
    }

    // body(chunk) for every chunk of [0, count).
    void run(int64_t count, const std::function<void(int64_t)> &body) {
        std::unique_lock<std::mutex> mine(busy_, std::defer_lock);
        if (workers_ == 0 || count < 2 || getpid() != pid_ || !mine.try_lock()) {
            for (int64_t chunk = 0; chunk < count; ++chunk) body(chunk);
            return;
        }
        {
            const std::lock_guard<std::mutex> guard(lock_);
            body_ = &body;
            next_ = 0;
            count_ = count;
            ++job_;
        }
        for (int64_t woken = 0; woken < workers_ && woken < count - 1; ++woken) wake_.notify_one();
        work(body, count);
        std::unique_lock<std::mutex> guard(lock_);
        body_ = nullptr;
        done_.wait(guard, [this] { return active_ == 0; });
    }

private:
    Pool() {
        for (int64_t wanted = threads() - 1; workers_ < wanted; ++workers_) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error &) {  // no more threads for this process
                return;
            }
        }
    }

    // OMP_NUM_THREADS, else the processors that this process may use.
    static int64_t threads() {
        const char *given = std::getenv("OMP_NUM_THREADS");
        if (given && std::atoi(given) > 0) return std::atoi(given);
        cpu_set_t mine;
        return sched_getaffinity(0, sizeof mine, &mine) == 0 ? CPU_COUNT(&mine) : 1;
    }

    void work(const std::function<void(int64_t)> &body, int64_t count) {
        for (int64_t chunk = next_++; chunk < count; chunk = next_++) body(chunk);
    }

    void serve() {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> guard(lock_);
        for (;;) {
            wake_.wait(guard, [&] { return body_ != nullptr && job_ != seen; });
            seen = job_;
            const std::function<void(int64_t)> &body = *body_;
            const int64_t count = count_;
            ++active_;
            guard.unlock();
            work(body, count);
            guard.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    const pid_t pid_ = getpid();
    std::mutex busy_, lock_;
    std::condition_variable wake_, done_;
    const std::function<void(int64_t)> *body_ = nullptr;
    std::atomic<int64_t> next_{0};
    int64_t count_ = 0, workers_ = 0;
    int active_ = 0;
    uint64_t job_ = 0;
};

// e^x for x <= 0, relative error 1e-7; 0 below -87.
inline float exp_of_negative(float x) {
    const float bounded = x < -87.0f ? -87.0f : x;
    const float shifted = bounded * 1.44269504f + 12582912.0f;  // the low bits hold round(x / ln 2)
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    const float power = shifted - 12582912.0f;
    const float r = (bounded - power * 0.693359375f) + power * 2.12194440e-4f;  // x - power ln 2, ln 2 in two parts
    float p = 1.3951717e-3f;
    p = p * r + 8.3695920e-3f;
    p = p * r + 4.1666187e-2f;
    p = p * r + 1.6666514e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const uint32_t scale_bits = (bits << 23) + 0x3f800000u;  // 2^power
    float scale;
    std::memcpy(&scale, &scale_bits, 4);
    return x < -87.0f ? 0.0f : p * scale;
}

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

int64_t size_of(int ndim, const int64_t *shape) {
    int64_t size = 1;
    for (int axis = 0; axis < ndim; ++axis) size *= shape[axis];
    return size;
}

// The arguments of one call.
struct Call {
    int count;
    void **params;
    int *ndims;
    int64_t **shapes;
    const char **dtypes;

    bool floats(int expected, int integers = -1) const {  // `integers`: the one parameter that is int32
        if (count != expected) return false;
        for (int index = 0; index < count; ++index)
            if (std::strcmp(dtypes[index], index == integers ? "int32" : "float32") != 0) return false;
        return true;
    }
    float *operator[](int index) const { return static_cast<float *>(params[index]); }
    int64_t size(int index) const { return size_of(ndims[index], shapes[index]); }
    int64_t columns(int index) const { return ndims[index] ? shapes[index][ndims[index] - 1] : 1; }
    int64_t rows(int index) const { return ndims[index] ? size_of(ndims[index] - 1, shapes[index]) : 1; }
    // Whether a parameter has an entry for each of the first one's entries, columns, rows.
    bool per_entry(int index) const { return size(index) == size(0); }
    bool per_column(int index) const { return size(index) == columns(0); }
    bool per_row(int index) const { return size(index) == rows(0); }
};

// body(first, last) for pieces of [0, size), on all threads; an index stands for `weight` elements of work.
template <class Body>
void each_piece(int64_t size, int64_t weight, const Body &body) {
    if (size * weight <= SMALL) {
        body(int64_t{0}, size);
        return;
    }
    const int64_t step = weight < CHUNK ? CHUNK / (weight > 1 ? weight : 1) : 1;
    Pool::instance().run((size + step - 1) / step, [&](int64_t chunk) {
        const int64_t first = chunk * step;
        body(first, first + step < size ? first + step : size);
    });
}

// body(row) for every row, on all threads.
template <class Body>
void each_row(int64_t rows, int64_t columns, const Body &body) {
    each_piece(rows, columns, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) body(row);
    });
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

// 1 / sqrt(mean of squares + epsilon) of a row.
inline float inverse_rms(const float *x, int64_t columns, float epsilon) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < columns; ++i) squares += x[i] * x[i];
    return 1.0f / std::sqrt(squares / static_cast<float>(columns) + epsilon);
}

inline float largest(const float *x, int64_t columns) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < columns; ++i) top = x[i] > top ? x[i] : top;
    return top;
}

// y = e^(x - top); their sum is returned. `y` may be `x`.
inline float exponentials(const float *x, float *y, int64_t columns, float top) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < columns; ++i) {
        const float e = exp_of_negative(x[i] - top);
        y[i] = e;
        sum += e;
    }
    return sum;
}

inline float sum_of_exponentials(const float *x, int64_t columns, float top) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < columns; ++i) sum += exp_of_negative(x[i] - top);
    return sum;
}

inline void softmax_row(float *y, int64_t columns) {
    const float top = largest(y, columns);
    const float factor = 1.0f / exponentials(y, y, columns, top);
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) y[i] *= factor;
}

}  // namespace

#define CALL \
    const Call call { count, params, ndims, shapes, dtypes }

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
KERNEL layer_norm_backward_beta(ARGUMENTS) {
    CALL;
    if (!call.floats(2)) return 1;
    const int64_t columns = call.columns(0);
    const float *dy = call[0];
    return sum_over_rows(call.rows(0), columns, call[1], [=](int64_t row, float *sums) {
        const float *grad = dy + row * columns;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) sums[i] += grad[i];
    });
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
        const float *in = x + row * columns;
        float *out = y + row * columns;
        const float scale = inverse_rms(in, columns, epsilon);
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[i] = in[i] * scale * weight[i];
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
    const int64_t *shape = shapes[0], *mask_shape = shapes[1];
    for (int axis = 0; axis < 4; ++axis)
        if (mask_shape[axis] != shape[axis] && (axis == 3 || mask_shape[axis] != 1)) return 1;
    const int64_t columns = shape[3], b = shape[1], c = shape[2];
    const int64_t step_c = mask_shape[2] == 1 ? 0 : columns;
    const int64_t step_b = mask_shape[1] == 1 ? 0 : mask_shape[2] * columns;
    const int64_t step_a = mask_shape[0] == 1 ? 0 : mask_shape[1] * mask_shape[2] * columns;
    const float *scores = call[0], *mask = call[1];
    float *y = call[2];
    each_row(call.rows(0), columns, [=](int64_t row) {
        const float *in = scores + row * columns;
        const float *add = mask + row / (b * c) * step_a + row / c % b * step_b + row % c * step_c;
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
