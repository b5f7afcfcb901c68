// Weights that are floats, used as they are stored, row by row: conversions, and products with a few tokens (see D61).
// The order of additions for a token does not depend on the number of tokens: see D30.
#pragma once
#include <algorithm>
#include <cstddef>

#include "vectors.h"

enum FloatType : int32_t { F32, BF16, F16 };

constexpr int TILE = LANES;  // rows of a weight that are multiplied together

// Converts n floats of a type, from index `first` on, to fp32.
inline void read_floats(const void *from, int type, size_t first, int n, float *to) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) switch (type) {
            case F32: store(to + i, load<f32>((const float *)from + first + i)); break;
            case BF16: store(to + i, from_bf16(load<u16>((const uint16_t *)from + first + i))); break;
            default: store(to + i, from_half(load<u16>((const uint16_t *)from + first + i)));
        }
    for (; i < n; i++) switch (type) {
            case F32: to[i] = ((const float *)from)[first + i]; break;
            case BF16: to[i] = from_bf16(((const uint16_t *)from)[first + i]); break;
            default: to[i] = from_half(((const uint16_t *)from)[first + i]);
        }
}

// Converts n fp32 values to floats of a type, from index `first` on.
inline void write_floats(void *to, int type, size_t first, int n, const float *from) {
    int i = 0;
    if (type == BF16)
        for (; i + LANES <= n; i += LANES) {
            u16 rounded = to_bf16(load<f32>(from + i));
            memcpy((uint16_t *)to + first + i, &rounded, sizeof rounded);
        }
    for (; i < n; i++) switch (type) {
            case F32: ((float *)to)[first + i] = from[i]; break;
            case BF16: ((uint16_t *)to)[first + i] = to_bf16(from[i]); break;
            default: ((uint16_t *)to)[first + i] = to_half(from[i]);
        }
}

inline int value_bytes(int type) { return type == F32 ? 4 : 2; }

// Loads 16 floats of any type as fp32.
inline f32 floats(const float *from) { return load<f32>(from); }
struct Bf16 {
    uint16_t bits;
};
inline f32 floats(const Bf16 *from) { return from_bf16(load<u16>(from)); }
struct Half {
    uint16_t bits;
};
inline f32 floats(const Half *from) { return from_half(load<u16>(from)); }

// Loads the first n of them, and zeros.
template <class T> inline f32 floats(const T *from, int n) {
    T padded[LANES] = {};
    memcpy(padded, from, n * sizeof(T));
    return floats(padded);
}

// Rows and tokens that are multiplied together: their sums, a vector each, are as many as compilers keep in registers.
// A sum is of every 16th column, so that none depends on how many there are.
#if defined(__AVX512F__)
constexpr int ROWS = 4, TOKENS = 6;
#elif defined(PAIRS)
constexpr int ROWS = 1, TOKENS = 4;
#else
constexpr int ROWS = 2, TOKENS = 3;
#endif

// Prefetch distances in bytes, to the second and to the first cache: memory answers so late that one core alone would
// wait, and processors' own prefetching stops at the end of a page.
constexpr int FAR_AHEAD = 16384, AHEAD = 1024;

// The sum of each of ROWS vectors, in the order of `sum`: with AVX-512 halves of two vectors at a time are added.
inline void sums_of_rows(const f32 *v, float *to) {
#if defined(__AVX512F__)
    f32 low = __builtin_shufflevector(v[0], v[2], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
              __builtin_shufflevector(v[0], v[2], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    f32 high = __builtin_shufflevector(v[1], v[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(v[1], v[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    f32 fours = __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                __builtin_shufflevector(low, high, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    fours += __builtin_shufflevector(fours, fours, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    fours += __builtin_shufflevector(fours, fours, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    for (int r = 0; r < ROWS; r++) to[r] = fours[r * 4];
#else
    for (int r = 0; r < ROWS; r++) to[r] = sum(v[r]);
#endif
}

// Multiplies ROWS rows of floats, or the first n of them, by N tokens: y[t * TILE + row]. GCC 12 keeps all sums in
// registers only in a function of its own, with all of its body in one piece.
template <class T, int N>
__attribute__((noinline)) void float_rows(const T *weight, int n, const float *x, int columns, float *y) {
    constexpr int LINE = 64 / sizeof(T);  // columns of a cache line
    // Rows are read side by side: what is far ahead of one is none of the others.
    const size_t far = std::max(size_t(columns) * ROWS * sizeof(T), size_t(FAR_AHEAD));
    f32 sums[N][ROWS] = {};
    const T *rows[ROWS];
    for (int r = 0; r < ROWS; r++) rows[r] = weight + size_t(r < n ? r : 0) * columns;
    auto add = [&](int c, auto load) __attribute__((always_inline)) {
        f32 w[ROWS];
        for (int r = 0; r < ROWS; r++) keep_in_register(w[r] = load(rows[r] + c));
        for (int t = 0; t < N; t++) {
            f32 values = load(x + size_t(t) * columns + c);
            keep_in_register(values);
            for (int r = 0; r < ROWS; r++) sums[t][r] += w[r] * values;
        }
    };
    auto whole = [](const auto *from) { return floats(from); };
    int c = 0;
    for (; c + LINE <= columns; c += LINE) {
        for (int r = 0; r < ROWS; r++) {
            const char *line = (const char *)(rows[r] + c);
            __builtin_prefetch(line + far, 0, 2);
            __builtin_prefetch(line + AHEAD);
        }
        for (int i = 0; i < LINE; i += LANES) add(c + i, whole);
    }
    for (; c + LANES <= columns; c += LANES) add(c, whole);
    if (c < columns) add(c, [&](const auto *from) { return floats(from, columns - c); });
    for (int t = 0; t < N; t++) {
        float totals[ROWS];
        sums_of_rows(sums[t], totals);
        memcpy(y + t * TILE, totals, n * sizeof(float));
    }
}

// Multiplies up to 16 rows of floats by n tokens, x (n, columns), N at a time and then the rest: y[t * TILE + row].
template <class T, int N = TOKENS>
inline void float_tile_of(const T *weight, int rows, const float *x, int columns, int n, float *y) {
    for (; n >= N; n -= N, x += size_t(N) * columns, y += N * TILE)
        for (int r = 0; r < rows; r += ROWS)
            float_rows<T, N>(weight + size_t(r) * columns, std::min(ROWS, rows - r), x, columns, y + r);
    if constexpr (N > 1)
        if (n) float_tile_of<T, N - 1>(weight, rows, x, columns, n, y);
}

// The same of any type.
inline void float_tile(int type, const void *weight, int rows, const float *x, int columns, int n, float *y) {
    switch (type) {
        case F32: return float_tile_of((const float *)weight, rows, x, columns, n, y);
        case BF16: return float_tile_of((const Bf16 *)weight, rows, x, columns, n, y);
        default: return float_tile_of((const Half *)weight, rows, x, columns, n, y);
    }
}
