// Matrix products of many tokens in bf16, by the processor's matrix unit (AMX), from packed blocks.
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

// Dequantizes a tile of packed rows to half a panel: to[column / 2][row].
inline void fill_panel(const Weight &w, int first, uint32_t *to) {
    f32 even{};
    const uint8_t *tile = w.data + size_t(first / TILE) * tile_bytes(w.type, w.columns);
    unpack_tile(w.type, tile, w.columns, [&](int column, f32 values) {
        if (column % 2 == 0) {
            even = values;
            return;
        }
        u32 both = pairs(even, values);
        memcpy(to + column / 2 * TILE, &both, sizeof both);
    });
}

// GCC does not know which memory the unit's instructions read, and would remove stores to it.
inline void memory_is_read(const void *at) { asm volatile("" : : "r"(at) : "memory"); }

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Copies tokens [token, token + 16) in the order of the unit: squares of 16 tokens and 32 columns, one after another.
// Rows in their own order would compete for the same lines of the caches.
inline void fill_tokens(const uint16_t *x, int n, int columns, int token, uint16_t *to) {
    for (int column = 0; column < columns; column += 32)
        for (int t = token; t < token + 16; t++, to += 32)
            if (t < n) memcpy(to, x + size_t(t) * columns + column, 64);
            else memset(to, 0, 64);
}

// Multiplies 32 tokens, in the order of fill_tokens, by the 32 rows of a panel: y[token][row].
inline void multiply_panel(const uint16_t *tokens, const uint32_t *panel, int columns, float *y) {
    const size_t more_tokens = size_t(columns) * 16, more_rows = size_t(columns / 2) * TILE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
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

// y (n, rows) = x (n, columns) times a packed weight transposed, in bf16; columns are a multiple of 32.
extern "C" void gemm(const Weight *weight, const uint16_t *x, int n, uint16_t *y, int threads) {
    const Weight &w = *weight;
    // Tokens may not fit into a core's cache: read them once for two panels, if there are panels for all threads.
    const int panels = w.rows >= 1024 * threads ? 2 : 1;
    static thread_local std::vector<uint16_t> token_storage;
    uint16_t *tokens = aligned_room(token_storage, size_t(n + 31) / 32 * 32 * w.columns);
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<uint32_t> panel_storage;
        const size_t size = size_t(w.columns) * TILE;  // of a panel
        uint32_t *panel = aligned_room(panel_storage, size * panels);
        TileConfig config;
        memory_is_read(&config);
        _tile_loadconfig(&config);
        alignas(64) float products[32 * 32];
#pragma omp for
        for (int token = 0; token < n + (32 - n % 32) % 32; token += 16)
            fill_tokens(x, n, w.columns, token, tokens + size_t(token) * w.columns);
#pragma omp for schedule(static)
        for (int first = 0; first < w.rows; first += 32 * panels) {
            const int stop = std::min(first + 32 * panels, w.rows);
            for (int row = first; row < stop; row += TILE)
                fill_panel(w, row, panel + (row - first) / TILE * (size / 2));
            memory_is_read(panel);
            for (int token = 0; token < n; token += 32)
                for (int row = first; row < stop; row += 32) {
                    const uint32_t *row_panel = panel + (row - first) / 32 * size;
                    multiply_panel(tokens + size_t(token) * w.columns, row_panel, w.columns, products);
                    const __mmask32 valid = stop - row < 32 ? (1u << (stop - row)) - 1 : ~0u;
                    for (int t = 0; t < 32 && token + t < n; t++) {
                        const float *from = products + t * 32;
                        __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_load_ps(from + 16), _mm512_load_ps(from));
                        _mm512_mask_storeu_epi16(y + size_t(token + t) * w.rows + row, valid, (__m512i)rounded);
                    }
                }
        }
        _tile_release();
    }
}
#else
extern "C" int has_matrix_unit() { return false; }
extern "C" void gemm(const Weight *, const uint16_t *, int, uint16_t *, int) {}
#endif
