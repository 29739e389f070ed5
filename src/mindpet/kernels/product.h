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
constexpr int64_t STRIPS = 96 / STRIP;  // that a thread takes at a time
constexpr int64_t DEPTH = 768;          // of a block: its strips and one panel stay in the second level of cache

// Strip (depth, STRIP) of A (rows, depth) from its row `first`, whose rows are contiguous; zeros beyond the last one.
void pack_strip(const float *a, int64_t a_row, int64_t rows, int64_t depth, float *strip) {
    for (int64_t i = 0; i < STRIP; ++i) {
        const float *from = a + i * a_row;
        if (i < rows)
            for (int64_t k = 0; k < depth; ++k) strip[k * STRIP + i] = from[k];
        else
            for (int64_t k = 0; k < depth; ++k) strip[k * STRIP + i] = 0.0f;
    }
}

// C (rows, columns) = A (rows, depth) B (depth, columns); A and C are contiguous. Returns 0, or 1 without memory.
// pack(first, panel) fills a panel (depth, PANEL) with the columns of B from the column `first`, and zeros beyond the last.
template <class Pack>
int multiply(int64_t rows, int64_t columns, int64_t depth, const float *a, const Pack &pack, float *c) {
    const int64_t panels = (columns + PANEL - 1) / PANEL;
    float *packed = scratch.room(panels * depth * PANEL);
    if (!packed && panels > 0 && depth > 0) return 1;
    each_piece(panels, depth * PANEL, [&](int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; ++panel)
            pack(panel * PANEL, packed + panel * depth * PANEL);
    });
    const int64_t chunk = STRIPS * STRIP, blocks = depth ? (depth + DEPTH - 1) / DEPTH : 1;
    std::atomic<bool> failed{false};
    Pool::instance().run((rows + chunk - 1) / chunk, [&](int64_t index) {
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
                pack_strip(a + row * depth + from, depth, last - row, deep, strips + (row - first) * deep);
            for (int64_t panel = 0; panel < panels; ++panel) {
                const float *b_panel = packed + (panel * depth + from) * PANEL;
                const int64_t column = panel * PANEL;
                for (int64_t row = first; row < last; row += STRIP) {
                    float *to = c + row * columns + column;
                    const float *strip = strips + (row - first) * deep;
                    if (last - row >= STRIP && columns - column >= PANEL) {
                        tile<STRIP>(deep, strip, 1, STRIP, b_panel, PANEL, to, columns, block > 0);
                        continue;
                    }
                    tile<STRIP>(deep, strip, 1, STRIP, b_panel, PANEL, corner, PANEL, false);
                    const int64_t high = last - row < STRIP ? last - row : STRIP;
                    const int64_t wide = columns - column < PANEL ? columns - column : PANEL;
                    for (int64_t i = 0; i < high; ++i)
                        for (int64_t j = 0; j < wide; ++j)
                            to[i * columns + j] = corner[i * PANEL + j] + (block ? to[i * columns + j] : 0.0f);
                }
            }
        }
    });
    scratch.trim();
    return failed ? 1 : 0;
}

}  // namespace
