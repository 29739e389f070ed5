// The matrix product C = A B of a dense layer, for a B that is somewhere in memory or made on the way.
//
// A thread takes some columns of B, packs them into panels that stay in its second level of cache, and goes through the
// rows of A, a strip at a time; the tile of C that a strip and a panel make stays in registers. Goto and van de Geijn
// 2008, Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), sections 4 and 5; other than there nothing
// packed is shared, so nobody waits, and rows of A that lie one after the other are read where they are. Sums run over
// the depth in one order, whatever the number of threads and of rows.
#pragma once

#include "common.h"

namespace {

constexpr int64_t STRIP = LANES == 16 ? 8 : 4;  // rows of a tile
constexpr int64_t WIDE = 3;                     // registers of a row of a tile
constexpr int64_t PANEL = WIDE * LANES;
constexpr int64_t SHARES = 8;  // pieces of a product, at least, where it is large enough
constexpr int64_t RUN = 8;     // entries of a column of A that are packed at a time: their lines of cache may collide

// What a thread takes at a time, at most: panels of B, strips of A, and how much of their depth.
struct Block {
    int64_t panels, strips, depth;
};
constexpr Block READ = {4, INT64_MAX, 800};  // A as it is in memory
constexpr Block PACKED = {12, 48, 400};      // A transposed: it is packed too

// A matrix in memory: entry (i, k) is data[i row + k column].
struct Matrix {
    const float *data;
    int64_t row, column;

    Matrix from(int64_t i, int64_t k) const { return {data + i * row + k * column, row, column}; }
};

// Panel (depth, REGISTERS LANES) of B (depth, columns) times `factor` from its column `first`, zeros beyond the last.
template <int64_t REGISTERS = WIDE>
inline void pack_panel(const Matrix &b, int64_t depth, int64_t columns, int64_t first, float *panel,
                       float factor = 1.0f) {
    constexpr int64_t PANEL = REGISTERS * LANES;
    const int64_t width = columns - first < PANEL ? columns - first : PANEL;
    const float *from = b.data + first * b.column;
    int64_t k = 0;
    if (b.row == 1 && factor == 1.0f && width == PANEL)
        for (; k + LANES <= depth; k += LANES)
            for (int64_t j = 0; j < PANEL; j += LANES)
                transpose(from + j * b.column + k, b.column, panel + k * PANEL + j, PANEL);
    for (; k < depth; ++k) {
        float *to = panel + k * PANEL;
        if (b.column == 1 && factor == 1.0f)
            std::memcpy(to, from + k * b.row, width * sizeof(float));
        else
            for (int64_t j = 0; j < width; ++j) to[j] = factor * from[j * b.column + k * b.row];
        for (int64_t j = width; j < PANEL; ++j) to[j] = 0.0f;
    }
}

// Strips (depth, STRIP) of the rows of A, one after the other. What is beyond the last row is left as it was.
inline void pack_strips(const Matrix &a, int64_t rows, int64_t depth, float *strips) {
    for (int64_t begin = 0; begin < depth; begin += RUN)
        for (int64_t row = 0; row < rows; row += STRIP) {
            const int64_t high = rows - row < STRIP ? rows - row : STRIP;
            const int64_t end = begin + RUN < depth ? begin + RUN : depth;
            for (int64_t k = begin; k < end; ++k) {
                const float *from = a.data + row * a.row + k * a.column;
                float *to = strips + row * depth + k * STRIP;
                if (a.row == 1 && high == STRIP)
                    std::memcpy(to, from, STRIP * sizeof(float));
                else
                    for (int64_t i = 0; i < high; ++i) to[i] = from[i * a.row];
            }
        }
}

// The left factor: A (rows, depth), or [A | A2] with A2 (rows, more) beside it, where both have rows in one piece.
struct Left {
    Matrix a;
    int64_t depth;
    Matrix a2 = {};
    int64_t more = 0;

    // How many of the `deep` columns from `from` on are A's.
    int64_t own(int64_t from, int64_t deep) const {
        return from + deep <= depth ? deep : from < depth ? depth - from : 0;
    }
};

// C (high, REGISTERS LANES) = start + A (high, depth) B; see tile. `high` is from 1 to ROWS.
template <int64_t ROWS, int64_t REGISTERS = WIDE>
inline void tile_of(int64_t high, int64_t depth, const Matrix &a, const float *b, int64_t b_row, float *c,
                    int64_t c_row, const float *start, int64_t start_row, int64_t more = 0, const Matrix &a2 = {}) {
    if constexpr (ROWS > 1)
        if (high < ROWS)
            return tile_of<ROWS - 1, REGISTERS>(high, depth, a, b, b_row, c, c_row, start, start_row, more, a2);
    tile<ROWS, REGISTERS>(depth, a.data, a.row, a.column, b, b_row, c, c_row, start, start_row, more, a2.data, a2.row);
}

// C (rows, columns) = bias + A B, for a B (depth, columns) and a contiguous C. Returns 0, or 1 without memory.
// pack(first, from, deep, panel) fills a panel (deep, PANEL) with the rows of B from `from` on and its columns from
// `first` on, and zeros beyond the last. The bias (columns,) goes to every row; it may be null. With `add` it is C that
// the product is added to.
template <class Pack>
int multiply(int64_t rows, int64_t columns, const Left &left, const Pack &pack, const float *bias, float *c,
             bool add = false) {
    const bool in_memory = left.a.column == 1;
    const Block most = in_memory ? READ : PACKED;
    const int64_t depth = left.depth + left.more, blocks = depth ? (depth + most.depth - 1) / most.depth : 1;
    const int64_t deepest = depth < most.depth ? depth : most.depth;
    const int64_t panels = (columns + PANEL - 1) / PANEL, strips = (rows + STRIP - 1) / STRIP;
    const int64_t fewest = in_memory ? panels / SHARES : most.panels;
    const int64_t group = fewest < 1 ? 1 : fewest < most.panels ? fewest : most.panels;
    const int64_t groups = (panels + group - 1) / group, wanted = groups ? (SHARES + groups - 1) / groups : 1;
    const int64_t least = (strips - 1) / most.strips + 1;
    const int64_t parts = wanted > least && strips >= 8 * wanted ? wanted : least;
    std::atomic<bool> failed{false};
    Pool::instance().run(groups * parts, [&](int64_t index) {
        const int64_t first_panel = index % groups * group, part = index / groups;
        const int64_t last_panel = first_panel + group < panels ? first_panel + group : panels;
        const int64_t first = strips * part / parts * STRIP, end = strips * (part + 1) / parts * STRIP;
        const int64_t last = end < rows ? end : rows;
        float *corner = scratch.room(STRIP * PANEL + deepest * (group * PANEL + (in_memory ? 0 : end - first)));
        if (!corner) {
            failed = true;
            return;
        }
        float *packed = corner + STRIP * PANEL, *packed_strips = packed + deepest * group * PANEL;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t from = depth * block / blocks, deep = depth * (block + 1) / blocks - from;
            const int64_t own = left.own(from, deep);
            for (int64_t panel = first_panel; panel < last_panel; ++panel)
                pack(panel * PANEL, from, deep, packed + (panel - first_panel) * deep * PANEL);
            if (!in_memory) pack_strips(left.a.from(first, from), last - first, deep, packed_strips);
            for (int64_t row = first; row < last; row += STRIP) {
                const int64_t high = last - row < STRIP ? last - row : STRIP;
                const Matrix strip{packed_strips + (row - first) * deep, 1, STRIP};
                const Matrix a = in_memory ? left.a.from(row, from) : strip;
                for (int64_t panel = first_panel; panel < last_panel; ++panel) {
                    const float *b = packed + (panel - first_panel) * deep * PANEL;
                    const int64_t column = panel * PANEL, wide = columns - column < PANEL ? columns - column : PANEL;
                    float *to = c + row * columns + column;
                    const float *start = block || add ? to : bias ? bias + column : nullptr;
                    int64_t to_row = columns, start_row = block || add ? columns : 0;
                    if (wide < PANEL) {  // a whole tile has no room in C
                        for (int64_t i = 0; i < high; ++i)
                            for (int64_t j = 0; j < PANEL; ++j)
                                corner[i * PANEL + j] = start && j < wide ? start[i * start_row + j] : 0.0f;
                        start = to = corner, start_row = to_row = PANEL;
                    }
                    const Matrix a2 = own < deep ? left.a2.from(row, from + own - left.depth) : Matrix{};
                    tile_of<STRIP>(high, own, a, b, PANEL, to, to_row, start, start_row, deep - own, a2);
                    for (int64_t i = 0; wide < PANEL && i < high; ++i)
                        std::memcpy(c + (row + i) * columns + column, corner + i * PANEL, wide * sizeof(float));
                }
            }
        }
    });
    return failed ? 1 : 0;
}

// The same for a B in memory.
inline int multiply(int64_t rows, int64_t columns, const Left &a, const Matrix &b, const float *bias, float *c,
                    bool add = false) {
    const auto pack = [&](int64_t first, int64_t from, int64_t deep, float *panel) {
        pack_panel(b.from(from, 0), deep, columns, first, panel);
    };
    return multiply(rows, columns, a, pack, bias, c, add);
}

}  // namespace
