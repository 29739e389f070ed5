// What the kernels share: threads, the exponential, the arguments of a call, pieces of work.
//
// Every exported function has the signature of an ahead-of-time Custom operator: `params` holds the inputs and then the
// outputs, `shapes` and `ndims` their sizes. It returns 0, or 1 for arguments it does not take.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
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

// Before the first kernel runs. MindSpore sets OMP_NUM_THREADS to 1 when nobody else has set it, for itself alone.
extern int mindpet_wanted_threads;

namespace mindpet {

constexpr int64_t CHUNK = 8192;     // elements that a thread takes at a time
constexpr int64_t SMALL = 65536;    // elements below which waking other threads costs more than it saves
constexpr int64_t FEW = 4;          // the most rows that what is made for few rows takes
constexpr std::chrono::microseconds AWAKE{60};  // that a thread looks for the next kernel before it sleeps

// Threads that sleep between two kernels, unless the next one comes at once: to wake a thread takes longer than some
// kernels do. OpenMP's go on spinning for longer and take the processor away from the matrix product that follows; these
// give it to whoever wants it. A thread that does not wake up in time is not waited for: whoever is awake takes the
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
            job_.fetch_add(1, std::memory_order_release);
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

    // As many as `mindpet_threads` was told, else OMP_NUM_THREADS, else the processors that this process may use.
    static int64_t threads() {
        if (mindpet_wanted_threads > 0) return mindpet_wanted_threads;
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
            guard.unlock();
            const auto end = std::chrono::steady_clock::now() + AWAKE;
            while (job_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < end)
                std::this_thread::yield();
            guard.lock();
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
    std::atomic<uint64_t> job_{0};
};

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

typedef float Lanes __attribute__((vector_size(LANES * 4)));  // one register

inline Lanes load(const float *from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

inline void store(float *to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

// y (LANES, LANES), whose rows are `y_row` apart, is the transpose of x, whose rows are `x_row` apart.
inline void transpose(const float *x, int64_t x_row, float *y, int64_t y_row) {
#if defined(__GNUC__) && !defined(__clang__)
    typedef int32_t Places __attribute__((vector_size(LANES * 4)));
    Places low, high;  // of one entry of each of two registers in turn, from their first and from their second halves
    for (int32_t i = 0; i < LANES; ++i) {
        low[i] = i / 2 + i % 2 * static_cast<int32_t>(LANES);
        high[i] = low[i] + static_cast<int32_t>(LANES) / 2;
    }
    Lanes now[LANES], next[LANES];
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i) now[i] = load(x + i * x_row);
#pragma GCC unroll 4
    for (int64_t done = 1; done < LANES; done *= 2) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < LANES / 2; ++i) {
            next[2 * i] = __builtin_shuffle(now[i], now[i + LANES / 2], low);
            next[2 * i + 1] = __builtin_shuffle(now[i], now[i + LANES / 2], high);
        }
#pragma GCC unroll 16
        for (int64_t i = 0; i < LANES; ++i) now[i] = next[i];
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i) store(y + i * y_row, now[i]);
#else
    for (int64_t i = 0; i < LANES; ++i)
        for (int64_t j = 0; j < LANES; ++j) y[j * y_row + i] = x[i * x_row + j];
#endif
}

// C (ROWS, WIDE LANES) = start + A (ROWS, depth) B (depth, WIDE LANES); entry (i, k) of A is a[i row + k column].
// `start` is null for zeros, C itself to add to it, or one row for all where `start_row` is 0. B may have `more` rows,
// which are multiplied with as many columns of A2, whose rows are `row2` apart.
template <int64_t ROWS, int64_t WIDE>
inline void tile(int64_t depth, const float *a, int64_t row, int64_t column, const float *b, int64_t b_row, float *c,
                 int64_t c_row, const float *start, int64_t start_row, int64_t more = 0, const float *a2 = nullptr,
                 int64_t row2 = 0) {
    Lanes sums[ROWS][WIDE];
    for (int64_t i = 0; i < ROWS; ++i)
        for (int64_t j = 0; j < WIDE; ++j) sums[i][j] = start ? load(start + i * start_row + j * LANES) : Lanes{};
    const auto add = [&](int64_t depth, const float *a, int64_t row, int64_t column, const float *b) {
        for (int64_t k = 0; k < depth; ++k) {
            Lanes b_k[WIDE];
#pragma GCC unroll 4
            for (int64_t j = 0; j < WIDE; ++j) b_k[j] = load(b + k * b_row + j * LANES);
#pragma GCC unroll 16
            for (int64_t i = 0; i < ROWS; ++i) {
                const float factor = a[i * row + k * column];
#pragma GCC unroll 4
                for (int64_t j = 0; j < WIDE; ++j) sums[i][j] += factor * b_k[j];
            }
        }
    };
    add(depth, a, row, column, b);
    if (more > 0) add(more, a2, row2, 1, b + depth * b_row);
    for (int64_t i = 0; i < ROWS; ++i)
        for (int64_t j = 0; j < WIDE; ++j) store(c + i * c_row + j * LANES, sums[i][j]);
}

// Memory of one thread, kept for its next call; aligned to a cache line.
class Scratch {
public:
    ~Scratch() { std::free(memory_); }

    // Room for `floats`, or null.
    float *room(int64_t floats) {
        if (floats > size_) {
            std::free(memory_);
            const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
            memory_ = static_cast<float *>(std::aligned_alloc(64, bytes));
            size_ = memory_ ? floats : 0;
        }
        return memory_;
    }

private:
    float *memory_ = nullptr;
    int64_t size_ = 0;
};

inline thread_local Scratch scratch;

// Masks of dropout: entry (row, column) of a mask is kept when words[row] a words[column from the end] + b is at or
// above the threshold. `keys`: a, b, threshold, and the rank of the process, whose rows come after those of the ones
// before it.
struct Dropout {
    const uint32_t *words, *keys;
    int64_t pool, begin;  // words, and the row of the whole mask that is this process's first

    Dropout(const void *all, int64_t pool, const void *given, int64_t rows)
        : words(static_cast<const uint32_t *>(all)), keys(static_cast<const uint32_t *>(given)), pool(pool),
          begin(keys[3] * rows) {}

    bool fits(int64_t rows, int64_t columns) const { return begin + rows <= pool && columns <= pool; }

    // What the entries of a row are multiplied by: 0 or `kept`.
    void factors(int64_t row, int64_t columns, float kept, float *factor) const {
        const uint32_t word = words[begin + row] * keys[0], shift = keys[1];
        const int32_t threshold = static_cast<int32_t>(keys[2]);
        const uint32_t *last = words + pool - columns;
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j)
            factor[j] = static_cast<int32_t>(word * last[j] + shift) >= threshold ? kept : 0.0f;
    }
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

inline int64_t size_of(int ndim, const int64_t *shape) {
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
    // f for a float32, i for an int32, u for a uint8, w for a float32 or a uint8, one for each parameter.
    bool are(const char *letters) const {
        if (count != static_cast<int>(std::strlen(letters))) return false;
        for (int index = 0; index < count; ++index) {
            const char *name = letters[index] == 'i' ? "int32" : letters[index] == 'f' ? "float32" : "uint8";
            const bool either = letters[index] == 'w' && std::strcmp(dtypes[index], "float32") == 0;
            if (!either && std::strcmp(dtypes[index], name) != 0) return false;
        }
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

// Where the row of a mask begins that goes to a row of scores; a mask has 1 for any axis but the last.
struct MaskSteps {
    int64_t first = 0, second = 0, third = 0;
    bool fit = true;

    MaskSteps() = default;
    MaskSteps(const int64_t *mask, const int64_t *scores) {
        for (int axis = 0; axis < 4; ++axis) fit = fit && (mask[axis] == scores[axis] || (axis < 3 && mask[axis] == 1));
        third = mask[2] == 1 ? 0 : mask[3];
        second = mask[1] == 1 ? 0 : mask[2] * mask[3];
        first = mask[0] == 1 ? 0 : mask[1] * mask[2] * mask[3];
    }
    int64_t to(int64_t a, int64_t b, int64_t c) const { return a * first + b * second + c * third; }
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

// 1 / sqrt(mean of squares + epsilon) of a row.
inline float inverse_rms(const float *x, int64_t columns, float epsilon) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < columns; ++i) squares += x[i] * x[i];
    return 1.0f / std::sqrt(squares / static_cast<float>(columns) + epsilon);
}

inline void rms_norm(const float *x, const float *weight, float epsilon, float *y, int64_t columns) {
    const float scale = inverse_rms(x, columns, epsilon);
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) y[i] = x[i] * scale * weight[i];
}

// y = x cos + (the other half of x) sin, for the two halves of one head; `left` and `right` are the sines of each.
inline void turn(const float *x, const float *cos, const float *left, const float *right, float *y, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) y[i] = x[i] * cos[i] + x[half + i] * left[i];
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) y[half + i] = x[half + i] * cos[half + i] + x[i] * right[i];
}

}  // namespace mindpet

using namespace mindpet;

#define CALL \
    const Call call { count, params, ndims, shapes, dtypes }
