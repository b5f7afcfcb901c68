// Weights that are floats, used as they are stored, row by row: their conversions, and their products with a few tokens.
// The order of additions for a token does not depend on the number of tokens: see D30.
#pragma once
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

// Loads 16 floats, or converts one, of any type to fp32.
inline f32 floats(const float *from) { return load<f32>(from); }
inline float one(float from) { return from; }
struct Bf16 {
    uint16_t bits;
};
inline f32 floats(const Bf16 *from) { return from_bf16(load<u16>(from)); }
inline float one(Bf16 from) { return from_bf16(from.bits); }
struct Half {
    uint16_t bits;
};
inline f32 floats(const Half *from) { return from_half(load<u16>(from)); }
inline float one(Half from) { return from_half(from.bits); }

// Multiplies R rows of floats by N tokens from `token` on: y[t * TILE + row].
template <class T, int R, int N>
inline void float_rows(const T *weight, const float *x, int columns, float *y) {
    f32 sums[R][N] = {};
    const float *rows[N];
    for (int t = 0; t < N; t++) rows[t] = x + size_t(t) * columns;
    int c = 0;
    for (; c + LANES <= columns; c += LANES)
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(weight + size_t(r + 2 * R) * columns + c);
            f32 w = floats(weight + size_t(r) * columns + c);
            for (int t = 0; t < N; t++) sums[r][t] += w * load<f32>(rows[t] + c);
        }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < N; t++) {
            float rest = 0;
            for (int i = c; i < columns; i++) rest += one(weight[size_t(r) * columns + i]) * rows[t][i];
            y[t * TILE + r] = sum(sums[r][t]) + rest;
        }
}

// Multiplies up to 16 rows of floats by N tokens.
template <class T, int N>
inline void float_tile(const T *weight, int rows, const float *x, int columns, float *y) {
    constexpr int R = N == 8 ? 2 : 4;
    int r = 0;
    for (; r + R <= rows; r += R) float_rows<T, R, N>(weight + size_t(r) * columns, x, columns, y + r);
    for (; r < rows; r++) float_rows<T, 1, N>(weight + size_t(r) * columns, x, columns, y + r);
}
