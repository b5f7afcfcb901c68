// Products of weights with tokens, 16 rows of a weight (a tile) at a time.
//
// Floats are multiplied in fp32. Quantized blocks are multiplied as whole numbers: activations are rounded to 16 bits,
// with a scale for each 32 columns of a token, so that the error is a part in 2^16 of the greatest of them. The order of
// additions for a token does not depend on the number of tokens: see D30.
#pragma once
#include <type_traits>

#include "blocks.h"
#include "floats.h"

constexpr int MAX_FEW_TOKENS = 64;  // as in structures.py

struct LowRank;

struct Weight {
    int32_t type;
    int32_t rows, columns;
    const uint8_t *data;
    const float *bias;  // or null
    const LowRank *low_rank;  // or null

    bool is_packed() const { return type > F16; }
};

// What adapters add to a weight (rows, columns): b (rows, rank) times a (rank, columns).
struct LowRank {
    Weight a;  // floats
    const float *b;  // (tiles of rows, rank, TILE): zeros fill the last tile
};

inline size_t tile_bytes(int type, int columns) {
    return type <= F16 ? size_t(columns) * TILE * value_bytes(type) : packed_tile_bytes(type, columns);
}

constexpr int GROUP = 32;  // columns of a token whose activations share a scale

// GROUP columns of N tokens, rounded: value = scale * activation.
template <int N> struct Group {
    Quad quads[GROUP / 4][N];
    float scales[N];
    int32_t counts[2][N];  // sums of activations over 16 columns
    float sums[2][N];  // the same, times the scale
};

static_assert(sizeof(Group<8>) == 8 * sizeof(Group<1>), "tokens of a column take the same bytes in any number");

// Bytes of rounded activations of a token.
inline size_t rounded_bytes(int columns) { return size_t(columns / GROUP) * sizeof(Group<1>); }

inline int32_t sum(i32 v) {
    int32_t lanes[LANES], total = 0;
    memcpy(lanes, &v, sizeof v);
    for (int32_t lane : lanes) total += lane;
    return total;
}

// Rounds GROUP columns of one token, number t of a group. Where one of them is infinite or not a number, all products are
// not a number.
template <int N> inline void round_group(const float *x, Group<N> &to, int t) {
    u32 greatest = (load<u32>(x) & 0x7fffffff), other = load<u32>(x + LANES) & 0x7fffffff;
    greatest = pick(greatest > other, greatest, other);
    uint32_t lanes[LANES], most = 0;
    memcpy(lanes, &greatest, sizeof greatest);
    for (uint32_t lane : lanes) most = lane > most ? lane : most;
    float limit;
    memcpy(&limit, &most, 4);
    const bool is_zero = limit < 1e-34f;  // the inverse of less would be infinite
    const float scale = is_zero ? 0.0f : limit / MAX_ACTIVATION, inverse = is_zero ? 0.0f : MAX_ACTIVATION / limit;
    to.scales[t] = scale;
    for (int half = 0; half < 2; half++) {
        // Adding this rounds to a whole number in the low bits of the mantissa.
        f32 shifted = load<f32>(x + half * LANES) * inverse + 0x1.8p23f;
        i32 activations = pick(shifted == shifted, (i32)shifted - 0x4b400000, i32{});
        quads_of(activations, &to.quads[half * 4][t], N);
        to.counts[half][t] = sum(activations);
        to.sums[half][t] = scale * float(to.counts[half][t]);
    }
}

template <int N> inline void round_tokens(const float *x, int columns, void *to) {
    Group<N> *groups = (Group<N> *)to;
    for (int t = 0; t < N; t++)
        for (int g = 0; g < columns / GROUP; g++) round_group(x + size_t(t) * columns + g * GROUP, groups[g], t);
}

// Calls use(std::integral_constant<int, N>, first token) for tokens [start, stop), N at a time: MAX_BATCH, or less at the
// end: 4, 2 or 1.
template <class Use> inline void in_batches(int start, int stop, Use use) {
    int t = start;
    for (; t + MAX_BATCH <= stop; t += MAX_BATCH) use(std::integral_constant<int, MAX_BATCH>(), t);
    if (MAX_BATCH > 4 && t + 4 <= stop) use(std::integral_constant<int, 4>(), t), t += 4;
    if (MAX_BATCH > 2 && t + 2 <= stop) use(std::integral_constant<int, 2>(), t), t += 2;
    if (t < stop) use(std::integral_constant<int, 1>(), t);
}

// Activations of n tokens: values (n, columns), and for packed weights the same rounded, in batches as of in_batches.
struct Input {
    const float *values;
    const uint8_t *rounded;
    int columns, n;
};

// Rounds tokens [start, stop), of which `start` begins a batch.
inline void round_activations(const float *x, int columns, int start, int stop, uint8_t *to) {
    in_batches(start, stop, [&](auto count, int t) {
        round_tokens<count.value>(x + size_t(t) * columns, columns, to + t * rounded_bytes(columns));
    });
}

// Adds products of a group of columns with N tokens, of the rows in register I of a vector. One register at a time, so that
// its sums with all tokens stay in registers.
template <int I, int TYPE, int N, class Floats>
__attribute__((always_inline)) inline void add_group(
    const Head<TYPE> &scales, const Span<TYPE> &from, int group, int half, const Group<N> &x, Floats *sums
) {
    typedef decltype(part<I>(i32{})) Ints;
    constexpr Format f = format(TYPE);
    constexpr bool WHOLE = f.group == GROUP;
    constexpr int FOURS = f.group / 4;
    Ints high[N] = {}, low[N];
    for (int t = 0; t < N; t++) {
        const int32_t count = WHOLE ? x.counts[0][t] + x.counts[1][t] : x.counts[half][t];
        low[t] = (Ints{} + count) * -f.offset;
    }
#pragma GCC unroll 8
    for (int four = 0; four < FOURS; four++) {
        const auto w = factors(part<I>(from.codes(half * FOURS + four)));
        for (int t = 0; t < N; t++) add_products(high[t], low[t], w, x.quads[half * FOURS + four][t]);
    }
    const Floats scale = part<I>(scales.scale(group));
    for (int t = 0; t < N; t++) sums[t] += scale * x.scales[t] * __builtin_convertvector(total(high[t], low[t]), Floats);
    if constexpr (f.minimums) {
        const Floats minimum = part<I>(scales.minimum(group));
        for (int t = 0; t < N; t++) sums[t] += minimum * (WHOLE ? x.sums[0][t] + x.sums[1][t] : x.sums[half][t]);
    }
}
template <int TYPE, int N, class Floats, int... I>
inline void add_groups(
    std::integer_sequence<int, I...>, const Head<TYPE> &scales, const Span<TYPE> &from, int group, int half,
    const Group<N> &x, Floats (*sums)[N]
) {
    (add_group<I>(scales, from, group, half, x, sums[I]), ...);
}

// Multiplies a tile of packed rows by N tokens: y[t * TILE + row].
template <int TYPE, int N> inline void packed_tile(const uint8_t *tile, int columns, const Group<N> *x, float *y) {
    constexpr Format f = format(TYPE);
    constexpr int HALVES = GROUP / f.group, PARTS = REGISTERS<i32>;
    decltype(part<0>(f32{})) sums[PARTS][N] = {};
    const uint8_t *head = tile, *words = tile + heads_bytes(f, columns);
    // Whole tiles ahead, so that every line of a weight is asked for, heads and words alike.
    const size_t tile_size = packed_tile_bytes(TYPE, columns), far = (FAR_AHEAD + tile_size - 1) / tile_size * tile_size;
    for (int column = 0; column < columns; column += f.columns, head += f.head_bytes(), words += f.word_bytes()) {
        for (int i = 0; i < f.head_bytes(); i += 64) __builtin_prefetch(head + i + far, 0, 2);
        const Head<TYPE> scales(head);
        for (int span = 0; span < f.columns / GROUP; span++, x++) {
            const Span<TYPE> from(words, span);
#pragma GCC unroll 8
            for (int i = 0; i < f.low + f.high; i++) {
                const uint8_t *line = words + (span * (f.low + f.high) + i) * 64;
                __builtin_prefetch(line + far, 0, 2);
                __builtin_prefetch(line + AHEAD);
            }
#pragma GCC unroll 2
            for (int half = 0; half < HALVES; half++)
                add_groups(
                    std::make_integer_sequence<int, PARTS>(), scales, from, span * HALVES + half, half, *x, sums
                );
        }
    }
    for (int i = 0; i < PARTS; i++)
        for (int t = 0; t < N; t++) store(y + t * TILE + i * (LANES / PARTS), sums[i][t]);
}

// Multiplies a tile of adapters' b by what their a has made of n tokens, low (n, rank): y[t * TILE + row]. In one place, so
// that all who add it round alike.
__attribute__((noinline)) inline void low_rank_tile(const LowRank &w, int tile, const float *low, int n, float *y) {
    const float *b = w.b + size_t(tile) * w.a.rows * TILE;
    for (int t = 0; t < n; t++, low += w.a.rows) {
        f32 sum = {};
        for (int i = 0; i < w.a.rows; i++) sum += low[i] * load<f32>(b + size_t(i) * TILE);
        store(y + t * TILE, sum);
    }
}

// Multiplies a tile of rows by all tokens and adds the bias: y[t * TILE + row]. low: what the weight's adapters have made
// of the tokens, of which there are at most MAX_FEW_TOKENS then: (tokens, rank).
inline void gemv_tile(const Weight &w, int tile, const Input &x, float *y, const float *low = nullptr) {
    const uint8_t *data = w.data + tile * tile_bytes(w.type, w.columns);
    const int rows = w.rows - tile * TILE < TILE ? w.rows - tile * TILE : TILE;
    if (!w.is_packed()) float_tile(w.type, data, rows, x.values, x.columns, x.n, y);
    else
        in_batches(0, x.n, [&](auto count, int t) {
            const auto *groups = (const Group<count.value> *)(x.rounded + t * rounded_bytes(x.columns));
            with_type(w.type, [&](auto type) {
                packed_tile<type.value, count.value>(data, x.columns, groups, y + t * TILE);
            });
        });
    if (low) {
        float added[MAX_FEW_TOKENS * TILE];
        low_rank_tile(*w.low_rank, tile, low, x.n, added);
        for (int t = 0; t < x.n; t++)
            for (int r = 0; r < rows; r++) y[t * TILE + r] += added[t * TILE + r];
    }
    if (w.bias)
        for (int t = 0; t < x.n; t++)
            for (int r = 0; r < rows; r++) y[t * TILE + r] += w.bias[tile * TILE + r];
}

// Multiplies ROWS rows of adapters' a, or those that are left, by all tokens, at most MAX_FEW_TOKENS: (n, rank).
inline void low_rank_rows(const LowRank &w, int row, const Input &x, float *to) {
    float y[MAX_FEW_TOKENS * TILE];
    const int rows = w.a.rows - row < ROWS ? w.a.rows - row : ROWS;
    const uint8_t *data = w.a.data + size_t(row) * w.a.columns * value_bytes(w.a.type);
    float_tile(w.a.type, data, rows, x.values, x.columns, x.n, y);
    for (int t = 0; t < x.n; t++) memcpy(to + size_t(t) * w.a.rows + row, y + t * TILE, rows * 4);
}

// The same of all rows.
inline void low_rank_input(const LowRank &w, const Input &x, float *to) {
    for (int row = 0; row < w.a.rows; row += ROWS) low_rank_rows(w, row, x, to);
}
