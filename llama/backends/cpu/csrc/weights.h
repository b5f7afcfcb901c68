// Products of a few tokens with a weight, 16 of its rows (a tile) at a time.
//
// Floats are used as they are stored, row by row. Quantized blocks are packed tile by tile (see D31): first the heads
// of all groups of columns, then their codes as vectors of 16 words, with one row in each lane, so that nothing is
// summed over lanes. A word has the codes of adjacent columns, the first in its low bits: 4 codes of 8 bits, 8 of 4
// bits, or 16 of 2 bits.
//         columns  head                                                              words
//   Q8_0       32  half scale[16]                                                    [8]
//   Q4_0       32  half scale[16]                                                    [4]
//   Q4_1       32  half scale[16], minimum[16]                                       [4]
//   Q4_K      256  half d[16], dmin[16], uint8 scale[8][16], minimum[8][16]          [32]
//   Q6_K      256  half d[16], int8 scale[16][16]                                    [32] low 4 bits, [16] high 2
// The order of additions for a token does not depend on the number of tokens: see D30.
#pragma once
#include "floats.h"

enum BlockType : int32_t { Q8_0 = 3, Q4_0, Q4_1, Q4_K, Q6_K };

struct Weight {
    int32_t type;
    int32_t rows, columns;
    const uint8_t *data;
    const float *bias;  // or null
};

// Prefetch distance in bytes of packed codes, as processors' own prefetching stops at the end of a page. Of floats, the
// rows after the next ones are prefetched.
constexpr int AHEAD = 2048;

// Of a group of columns: their number, and the bytes of its head and of its words in a tile.
struct Layout {
    int columns, head, words;
};

constexpr Layout layout(int type) {
    switch (type) {
        case Q8_0: return {32, 32, 512};
        case Q4_0: return {32, 32, 256};
        case Q4_1: return {32, 64, 256};
        case Q4_K: return {256, 320, 2048};
        default: return {256, 288, 3072};
    }
}

// Bytes of the heads of a tile, padded so that words are aligned to cache lines.
inline int heads_bytes(const Layout &l, int columns) { return (columns / l.columns * l.head + 63) / 64 * 64; }

inline int tile_bytes(int type, int columns) {
    if (type <= F16) return columns * TILE * value_bytes(type);
    Layout l = layout(type);
    return heads_bytes(l, columns) + columns / l.columns * l.words;
}

// Activations of n tokens: values (n, columns), and their sums over every 16 columns, (n, columns / 16).
struct Input {
    const float *values, *sums;
    int columns;
    const float *row(int token) const { return values + size_t(token) * columns; }
    const float *sum_row(int token) const { return sums + size_t(token) * (columns / 16); }
};

// Sums over every 16 of n values.
inline void sum_sixteens(const float *x, size_t n, float *sums) {
    for (size_t i = 0; i < n / 16; i++) sums[i] = sum(load<f32>(x + i * 16));
}

// The activations of N tokens from a column on.
template <int N> struct Columns {
    const float *rows[N], *sums[N];
    Columns(const Input &x, int token, int column) {
        for (int t = 0; t < N; t++) rows[t] = x.row(token + t) + column, sums[t] = x.sum_row(token + t) + column / 16;
    }
};

// Sums of codes times the activations of N tokens. Even and odd columns are summed apart, so that additions overlap.
template <int N> struct Products {
    f32 even[N] = {}, odd[N] = {};

    void add(f32 codes, const Columns<N> &x, int column) {
        for (int t = 0; t < N; t++) (column & 1 ? odd : even)[t] += codes * x.rows[t][column];
    }
    f32 total(int t) const { return even[t] + odd[t]; }
};

// The products of 32 columns of 4-bit codes, from column `first` on.
template <int N> inline Products<N> nibbles(const uint8_t *words, float offset, const Columns<N> &x, int first) {
    Products<N> p;
#pragma GCC unroll 4
    for (int w = 0; w < 4; w++) {
        u32 word = load<u32>(words + w * 64);
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) p.add(four_bits(word >> 4 * c, offset), x, first + w * 8 + c);
    }
    return p;
}

// Each of these structs adds the products of one group of columns to y, a vector of 16 rows for each token.
struct Q8 {
    static constexpr BlockType TYPE = Q8_0;
    template <int N> static inline void add(f32 *y, const uint8_t *head, const uint8_t *words, const Columns<N> &x) {
        Products<N> p;
#pragma GCC unroll 8
        for (int w = 0; w < 8; w++) {
            i32 word = load<i32>(words + w * 64);
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) p.add(__builtin_convertvector(word << (24 - 8 * c) >> 24, f32), x, w * 4 + c);
        }
        f32 scale = from_half(load<u16>(head));
        for (int t = 0; t < N; t++) y[t] += scale * p.total(t);
    }
};

struct Q40 {
    static constexpr BlockType TYPE = Q4_0;
    template <int N> static inline void add(f32 *y, const uint8_t *head, const uint8_t *words, const Columns<N> &x) {
        Products<N> p = nibbles<N>(words, -8, x, 0);
        f32 scale = from_half(load<u16>(head));
        for (int t = 0; t < N; t++) y[t] += scale * p.total(t);
    }
};

struct Q41 {
    static constexpr BlockType TYPE = Q4_1;
    template <int N> static inline void add(f32 *y, const uint8_t *head, const uint8_t *words, const Columns<N> &x) {
        Products<N> p = nibbles<N>(words, 0, x, 0);
        f32 scale = from_half(load<u16>(head)), minimum = from_half(load<u16>(head + 32));
        for (int t = 0; t < N; t++) {
            y[t] += scale * p.total(t);
            y[t] += minimum * (x.sums[t][0] + x.sums[t][1]);
        }
    }
};

struct Q4K {
    static constexpr BlockType TYPE = Q4_K;
    template <int N> static inline void add(f32 *y, const uint8_t *head, const uint8_t *words, const Columns<N> &x) {
        f32 d = from_half(load<u16>(head)), dmin = from_half(load<u16>(head + 32));
        for (int g = 0; g < 8; g++) {
            Products<N> p = nibbles<N>(words + g * 256, 0, x, g * 32);
            f32 scale = d * __builtin_convertvector(widened(load<u8>(head + 64 + g * 16)), f32);
            f32 minimum = dmin * __builtin_convertvector(widened(load<u8>(head + 192 + g * 16)), f32);
            for (int t = 0; t < N; t++) {
                y[t] += scale * p.total(t);
                y[t] -= minimum * (x.sums[t][g * 2] + x.sums[t][g * 2 + 1]);
            }
        }
    }
};

struct Q6K {
    static constexpr BlockType TYPE = Q6_K;
    template <int N> static inline void add(f32 *y, const uint8_t *head, const uint8_t *words, const Columns<N> &x) {
        f32 d = from_half(load<u16>(head));
        for (int g = 0; g < 16; g++) {
            Products<N> p;
            u32 high = load<u32>(words + 2048 + g * 64);
#pragma GCC unroll 2
            for (int w = 0; w < 2; w++) {
                u32 low = load<u32>(words + (g * 2 + w) * 64);
#pragma GCC unroll 8
                for (int c = 0; c < 8; c++)
                    p.add(four_bits(low >> 4 * c, 0) + two_bits(high >> 2 * (w * 8 + c), -32), x, g * 16 + w * 8 + c);
            }
            i32 scale = widened(load<u8>(head + 32 + g * 16)) << 24 >> 24;
            for (int t = 0; t < N; t++) y[t] += d * __builtin_convertvector(scale, f32) * p.total(t);
        }
    }
};

// Multiplies a tile of packed rows by N tokens from `token` on: y[t * TILE + row].
template <class Q, int N>
inline void packed_tile(const uint8_t *tile, const Input &x, int token, float *y) {
    f32 sums[N] = {};
    constexpr Layout l = layout(Q::TYPE);
    const uint8_t *words = tile + heads_bytes(l, x.columns);
    for (int column = 0; column < x.columns; column += l.columns, tile += l.head, words += l.words) {
        for (int i = 0; i < l.words; i += 64) __builtin_prefetch(words + i + AHEAD);
        Q::template add<N>(sums, tile, words, Columns<N>(x, token, column));
    }
    for (int t = 0; t < N; t++) store(y + t * TILE, sums[t]);
}

// Multiplies a tile of any type by N tokens from `token` on.
template <int N> inline void gemv_tile_tokens(const Weight &w, int tile, const Input &x, int token, float *y) {
    const uint8_t *data = w.data + size_t(tile) * tile_bytes(w.type, w.columns);
    int rows = w.rows - tile * TILE < TILE ? w.rows - tile * TILE : TILE;
    switch (w.type) {
        case F32: return float_tile<float, N>((const float *)data, rows, x.row(token), x.columns, y);
        case BF16: return float_tile<Bf16, N>((const Bf16 *)data, rows, x.row(token), x.columns, y);
        case F16: return float_tile<Half, N>((const Half *)data, rows, x.row(token), x.columns, y);
        case Q8_0: return packed_tile<Q8, N>(data, x, token, y);
        case Q4_0: return packed_tile<Q40, N>(data, x, token, y);
        case Q4_1: return packed_tile<Q41, N>(data, x, token, y);
        case Q4_K: return packed_tile<Q4K, N>(data, x, token, y);
        case Q6_K: return packed_tile<Q6K, N>(data, x, token, y);
    }
}

// Multiplies a tile of rows by n tokens and adds the bias: y[t * TILE + row].
inline void gemv_tile(const Weight &w, int tile, const Input &x, int n, float *y) {
    int t = 0;
    for (; t + 8 <= n; t += 8) gemv_tile_tokens<8>(w, tile, x, t, y + t * TILE);
    if (t + 4 <= n) gemv_tile_tokens<4>(w, tile, x, t, y + t * TILE), t += 4;
    if (t + 2 <= n) gemv_tile_tokens<2>(w, tile, x, t, y + t * TILE), t += 2;
    if (t < n) gemv_tile_tokens<1>(w, tile, x, t, y + t * TILE);
    if (w.bias)
        for (t = 0; t < n; t++)
            for (int r = 0; r < TILE && tile * TILE + r < w.rows; r++) y[t * TILE + r] += w.bias[tile * TILE + r];
}
