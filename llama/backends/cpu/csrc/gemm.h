// Matrix products of many tokens by the processor's matrix unit (AMX), which multiplies bf16, from packed blocks.
//
// A float is the sum of two bf16 terms, up to a part in 2^17. Activations in fp32 and their weights are split in such
// terms, and of the four products that of the two small terms is left out; activations in bf16 take one product.
//
// 32 rows of the weight at a time are dequantized to bf16 in the order that the unit needs: a panel, which stays in the
// core's cache while it is multiplied by all tokens. So the weight is read once, and never dequantized as a whole.
#pragma once
#include <algorithm>
#include <vector>

#include "pack.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// Tells whether this process may use the unit, for which Linux has to be asked.
extern "C" int has_matrix_unit() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

// Rounds two adjacent columns of 16 rows to bf16: each lane has the pair of its row.
inline u32 pairs(f32 first, f32 second) {
    typedef uint16_t u16x32 __attribute__((vector_size(64)));
    u16x32 v = (u16x32)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (u32)__builtin_shufflevector(
        v, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
        30, 15, 31
    );
}

// What is left of a value when its nearest bf16 is taken off.
inline f32 remainder(f32 v) { return v - from_bf16(to_bf16(v)); }

// Dequantizes a tile of packed rows to half a panel, to[column / 2][row], and if `small` is not null to the same half
// of the panel of small terms.
inline void fill_panel(const Weight &w, int first, uint32_t *to, uint32_t *small) {
    f32 even{};
    const uint8_t *tile = w.data + size_t(first / TILE) * tile_bytes(w.type, w.columns);
    unpack_tile(w.type, tile, w.columns, [&](int column, f32 values) {
        if (column % 2 == 0) {
            even = values;
            return;
        }
        u32 both = pairs(even, values);
        memcpy(to + column / 2 * TILE, &both, sizeof both);
        if (!small) return;
        both = pairs(remainder(even), remainder(values));
        memcpy(small + column / 2 * TILE, &both, sizeof both);
    });
}

// GCC does not know which memory the unit's instructions read, and would remove stores to it.
inline void memory_is_read(const void *at) { asm volatile("" : : "r"(at) : "memory"); }

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Writes 32 values as bf16, and the small terms of floats as well.
inline void split(const uint16_t *x, uint16_t *to, uint16_t *) { memcpy(to, x, 64); }
inline void split(const float *x, uint16_t *to, uint16_t *small) {
    for (int i = 0; i < 32; i += LANES) {
        f32 v = load<f32>(x + i);
        u16 large = to_bf16(v), rest = to_bf16(remainder(v));
        memcpy(to + i, &large, sizeof large);
        memcpy(small + i, &rest, sizeof rest);
    }
}

// Copies tokens [token, token + 16) in the order of the unit: squares of 16 tokens and 32 columns, one after another.
// Rows in their own order would compete for the same lines of the caches.
template <class T>
inline void fill_tokens(const T *x, int n, int columns, int token, uint16_t *to, uint16_t *small) {
    for (int column = 0; column < columns; column += 32)
        for (int t = token; t < token + 16; t++, to += 32, small += 32) {
            T zeros[32] = {};
            split(t < n ? x + size_t(t) * columns + column : zeros, to, small);
        }
}

// Adds to the unit's tiles 0 to 3 the products of 32 tokens, in the order of fill_tokens, with the 32 rows of a panel.
inline void add_panel(const uint16_t *tokens, const uint32_t *panel, int columns) {
    const size_t more_tokens = size_t(columns) * 16, more_rows = size_t(columns / 2) * TILE;
    for (int square = 0; square < columns / 32; square++, tokens += 512, panel += 256) {
        _tile_loadd(4, tokens, 64);
        _tile_loadd(5, tokens + more_tokens, 64);
        _tile_loadd(6, panel, 64);
        _tile_loadd(7, panel + more_rows, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// Stores what the tiles hold: y[token][row].
inline void store_tiles(float *y) {
    _tile_stored(0, y, 128);
    _tile_stored(1, y + 16, 128);
    _tile_stored(2, y + 16 * 32, 128);
    _tile_stored(3, y + 16 * 32 + 16, 128);
}

// Resizes v for n values, and returns the first address in it that begins a cache line.
template <class T> T *aligned_room(std::vector<T> &v, size_t n) {
    v.resize(n + 64 / sizeof(T));
    return (T *)((uintptr_t(v.data()) + 63) / 64 * 64);
}

// Rounds 32 fp32 values and writes the first n.
inline void write_rounded(const float *from, int n, float *to) { memcpy(to, from, size_t(n) * 4); }
inline void write_rounded(const float *from, int n, uint16_t *to) { write_floats(to, BF16, 0, n, from); }

template <class T> void gemm_of(const Weight &w, const T *x, int n, T *y, int threads) {
    constexpr int TERMS = sizeof(T) / sizeof(uint16_t);
    // Tokens may not fit into a core's cache: read them once for two panels, if there are panels for all threads.
    const int panels = w.rows >= 1024 * threads ? 2 : 1;
    const size_t panel_size = size_t(w.columns) * TILE, token_size = size_t(n + 31) / 32 * 32 * w.columns;
    static thread_local std::vector<uint16_t> token_storage;
    uint16_t *tokens = aligned_room(token_storage, token_size * TERMS), *small_tokens = tokens + token_size * (TERMS - 1);
    Team team;
    parallel(threads, [&](int thread, int size) {
        static thread_local std::vector<uint32_t> panel_storage;
        uint32_t *panel = aligned_room(panel_storage, panel_size * panels * TERMS);
        uint32_t *small_panel = TERMS == 2 ? panel + panel_size * panels : nullptr;
        TileConfig config;
        memory_is_read(&config);
        _tile_loadconfig(&config);
        alignas(64) float products[32 * 32];
        const Share squares((n + 31) / 32 * 2, thread, size);
        for (int token = squares.start * 16; token < squares.stop * 16; token += 16) {
            const size_t at = size_t(token) * w.columns;
            fill_tokens(x, n, w.columns, token, tokens + at, small_tokens + at);
        }
        team.wait(size);
        const Share share((w.rows + 32 * panels - 1) / (32 * panels), thread, size);
        for (int first = share.start * 32 * panels; first < share.stop * 32 * panels; first += 32 * panels) {
            const int stop = std::min(first + 32 * panels, w.rows);
            for (int row = first; row < stop; row += TILE) {
                const size_t at = (row - first) / TILE * (panel_size / 2);
                fill_panel(w, row, panel + at, small_panel ? small_panel + at : nullptr);
            }
            memory_is_read(panel);
            for (int token = 0; token < n; token += 32)
                for (int row = first; row < stop; row += 32) {
                    const size_t at = (row - first) / 32 * panel_size, token_at = size_t(token) * w.columns;
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                    if (TERMS == 2) {
                        add_panel(small_tokens + token_at, panel + at, w.columns);
                        add_panel(tokens + token_at, small_panel + at, w.columns);
                    }
                    add_panel(tokens + token_at, panel + at, w.columns);
                    store_tiles(products);
                    for (int t = 0; t < 32 && token + t < n; t++)
                        write_rounded(products + t * 32, std::min(32, stop - row), y + size_t(token + t) * w.rows + row);
                }
        }
        _tile_release();
    });
}

// y (n, rows) = x (n, columns) times a packed weight transposed, both fp32 or bf16; columns are a multiple of 32.
extern "C" void gemm(const Weight *weight, const void *x, int n, void *y, int type, int threads) {
    if (type == F32) gemm_of(*weight, (const float *)x, n, (float *)y, threads);
    else gemm_of(*weight, (const uint16_t *)x, n, (uint16_t *)y, threads);
}
#else
extern "C" int has_matrix_unit() { return false; }
extern "C" void gemm(const Weight *, const void *, int, void *, int, int) {}
#endif
