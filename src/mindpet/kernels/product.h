// The matrix product C = A B of a dense layer, for a B that is somewhere in memory or made on the way.
//
// B is packed into panels of a few columns, A into strips of a few rows, so that the innermost loop reads both in order;
// the tile of C stays in registers. Goto and van de Geijn 2008, Anatomy of High-Performance Matrix Multiplication, ACM
// TOMS 34(3), sections 4 and 5. Sums run over the depth in one order, whatever the number of threads.
#pragma once

#include "common.h"

namespace {

constexpr int64_t STRIP = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;  // rows of a tile
constexpr int64_t PANEL = TILE_COLUMNS;
constexpr int64_t STRIPS = 96 / STRIP;  // that a thread takes at a time, fewer if there are few
constexpr int64_t SHARES = 8;           // pieces of a product, at least, where there are as many strips
constexpr int64_t DEPTH = 832;          // of a block: its strips and one panel stay in the second level of cache

// A matrix in memory: entry (i, k) is data[i row + k column].
struct Matrix {
    const float *data;
    int64_t row, column;

    Matrix from(int64_t i, int64_t k) const { return {data + i * row + k * column, row, column}; }
};

// Strip (depth, STRIP) of A (rows, depth), all of whose rows it holds if they are fewer; zeros beyond the last one.
inline void pack_strip(const Matrix &a, int64_t rows, int64_t depth, float *strip) {
    const int64_t high = rows < STRIP ? rows : STRIP;
    if (a.row == 1 && high == STRIP) {
        for (int64_t k = 0; k < depth; ++k) std::memcpy(strip + k * STRIP, a.data + k * a.column, STRIP * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < STRIP; ++i) {
        const float *from = a.data + i * a.row;
        for (int64_t k = 0; k < depth; ++k) strip[k * STRIP + i] = i < high ? from[k * a.column] : 0.0f;
    }
}

// Panel (depth, PANEL) of B (depth, columns) times `factor` from its column `first`; zeros beyond the last one.
inline void pack_panel(const Matrix &b, int64_t depth, int64_t columns, int64_t first, float *panel, float factor = 1.0f) {
    const int64_t width = columns - first < PANEL ? columns - first : PANEL;
    const float *from = b.data + first * b.column;
    if (b.column == 1 && factor == 1.0f) {
        for (int64_t k = 0; k < depth; ++k, panel += PANEL) {
            std::memcpy(panel, from + k * b.row, width * sizeof(float));
            for (int64_t j = width; j < PANEL; ++j) panel[j] = 0.0f;
        }
        return;
    }
    for (int64_t k = 0; k < depth; ++k, panel += PANEL) {
        for (int64_t j = 0; j < width; ++j) panel[j] = factor * from[j * b.column + k * b.row];
        for (int64_t j = width; j < PANEL; ++j) panel[j] = 0.0f;
    }
}

// The left factor: A (rows, depth), or [A | A2] with A2 (rows, more) beside it.
struct Left {
    Matrix a;
    int64_t depth;
    Matrix a2 = {};
    int64_t more = 0;

    // The columns from `from` on, `deep` of them, of a strip of rows.
    void pack(int64_t row, int64_t rows, int64_t from, int64_t deep, float *strip) const {
        const int64_t first = from < depth ? (depth - from < deep ? depth - from : deep) : 0;  // of A
        if (first > 0) pack_strip(a.from(row, from), rows, first, strip);
        if (first < deep) pack_strip(a2.from(row, from + first - depth), rows, deep - first, strip + first * STRIP);
    }
};

// C (rows, columns) = bias + A B, for a B (depth, columns) and a contiguous C. Returns 0, or 1 without memory.
// pack(first, panel) fills a panel (depth, PANEL) with the columns of B from the column `first`, and zeros beyond the
// last. The bias (columns,) goes to every row; it may be null.
template <class Pack>
int multiply(int64_t rows, int64_t columns, const Left &a, const Pack &pack, const float *bias, float *c) {
    const int64_t panels = (columns + PANEL - 1) / PANEL, depth = a.depth + a.more;
    float *packed = scratch.room(panels * depth * PANEL);
    if (!packed && panels > 0 && depth > 0) return 1;
    const int64_t wanted = rows / (STRIP * SHARES), strips_each = wanted < 1 ? 1 : wanted < STRIPS ? wanted : STRIPS;
    const int64_t chunk = strips_each * STRIP, blocks = depth ? (depth + DEPTH - 1) / DEPTH : 1;
    const int64_t together = depth * PANEL < CHUNK ? CHUNK / (depth * PANEL + 1) : 1;  // panels that are packed at a time
    const int64_t packs = (panels + together - 1) / together;
    std::atomic<int64_t> unpacked{packs};
    std::atomic<bool> failed{false};
    // Work is taken in order: whoever comes to the rows waits for panels that others are packing at that moment, no more.
    Pool::instance().run(packs + (rows + chunk - 1) / chunk, [&](int64_t index) {
        if (index < packs) {
            const int64_t end = (index + 1) * together < panels ? (index + 1) * together : panels;
            for (int64_t panel = index * together; panel < end; ++panel)
                pack(panel * PANEL, packed + panel * depth * PANEL);
            --unpacked;
            return;
        }
        index -= packs;
        while (unpacked > 0) std::this_thread::yield();
        thread_local Scratch own;  // `scratch` may hold the panels
        float *strips = own.room(chunk * DEPTH + STRIP * PANEL);
        if (!strips) {
            failed = true;
            return;
        }
        float *corner = strips + chunk * DEPTH;
        const int64_t first = index * chunk, last = first + chunk < rows ? first + chunk : rows;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t from = depth * block / blocks, deep = depth * (block + 1) / blocks - from;
            for (int64_t row = first; row < last; row += STRIP)
                a.pack(row, last - row, from, deep, strips + (row - first) * deep);
            for (int64_t panel = 0; panel < panels; ++panel) {
                const float *b_panel = packed + (panel * depth + from) * PANEL;
                const int64_t column = panel * PANEL;
                for (int64_t row = first; row < last; row += STRIP) {
                    float *to = c + row * columns + column;
                    const float *strip = strips + (row - first) * deep;
                    const float *start = block ? to : bias ? bias + column : nullptr;
                    const int64_t start_row = block ? columns : 0;
                    if (last - row >= STRIP && columns - column >= PANEL) {
                        tile<STRIP>(deep, strip, 1, STRIP, b_panel, PANEL, to, columns, start, start_row);
                        continue;
                    }
                    const int64_t high = last - row < STRIP ? last - row : STRIP;
                    const int64_t wide = columns - column < PANEL ? columns - column : PANEL;
                    for (int64_t i = 0; i < STRIP; ++i)  // in the order of a whole tile, so that the sums are the same
                        for (int64_t j = 0; j < PANEL; ++j)
                            corner[i * PANEL + j] = start && i < high && j < wide ? start[i * start_row + j] : 0.0f;
                    tile<STRIP>(deep, strip, 1, STRIP, b_panel, PANEL, corner, PANEL, corner, PANEL);
                    for (int64_t i = 0; i < high; ++i)
                        std::memcpy(to + i * columns, corner + i * PANEL, wide * sizeof(float));
                }
            }
        }
    });
    scratch.trim();
    return failed ? 1 : 0;
}

}  // namespace
