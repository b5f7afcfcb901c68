// Products of a few queries with a panel: a matrix whose rows are loaded as vectors, and multiplied by one word of each
// query. Keys become a panel by being turned, so that a lane has a key; values are one as they are.
//
// Each sum has one order, whatever is computed beside it: see D30.
#pragma once
#include <algorithm>
#include <vector>

#include "floats.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// Lanes of a vector as wide as the processor's, and the vectors of a panel's row and the queries that are multiplied at
// once: their sums stay in registers.
#if defined(__AVX512F__)
constexpr int NATIVE = 16, TILE_VECTORS = 4;
#elif defined(__AVX2__)
constexpr int NATIVE = 8, TILE_VECTORS = 2;
#else
constexpr int NATIVE = 4, TILE_VECTORS = 4;
#endif
constexpr int TILE_QUERIES = 6;

typedef float native __attribute__((vector_size(NATIVE * 4)));
typedef uint32_t native_words __attribute__((vector_size(NATIVE * 4)));
typedef uint16_t native_halves __attribute__((vector_size(NATIVE * 2)));

// GCC 12 takes five instructions for what the processor does in one.
inline native_words widened(native_halves v) {
#if defined(__AVX512F__)
    return (native_words)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (native_words)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, native_words);
#endif
}

inline native native_floats(const float *from) { return load<native>(from); }
inline native native_floats(const Bf16 *from) {
    return (native)(widened(load<native_halves>(from)) << 16);
}
inline native from_halves(native_words v) {
    u16 sixteen{};
    const native_halves halves = __builtin_convertvector(v, native_halves);
    memcpy(&sixteen, &halves, sizeof halves);
    f32 all_lanes = from_half(sixteen);
    return load<native>(&all_lanes);
}

// What a word of a query and of a panel is, and its product.
struct Fp32 {
    static constexpr int PER_WORD = 1;
    static native add(native sums, float word, native values) { return sums + word * values; }
};
#if defined(__AVX512BF16__)
#define HAS_BF16_PAIRS 1
struct Bf16Pairs {
    static constexpr int PER_WORD = 2;
    static native add(native sums, float word, native values) {
        return (native)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_ps(word), (__m512bh)(__m512)values);
    }
};
#endif

// Rows of a panel in a thread's own memory.
struct Panel {
    const float *first;
    size_t stride;
    const float *row(int i) const { return first + i * stride; }
    static native values(const float *row) { return load<native>(row); }
};

// Cache lines that are asked for meanwhile, a few in each round of a tile: many at once would hold up what follows.
struct Ahead {
    const uint8_t *const *lines = nullptr;  // `rate` of each round
    int rate = 0;
};

// Multiplies M queries by N vectors of each of n rows, from `column` on: c = or += a b.
template <class Op, int M, int N, class Rows>
inline void multiply_tile(
    const float *a, size_t a_stride, const Rows &b, int n, int column, float *c, size_t c_stride, bool add, Ahead ahead
) {
    native sums[M][N] = {};
    if (add)
        for (int m = 0; m < M; m++)
            for (int v = 0; v < N; v++) sums[m][v] = load<native>(c + m * c_stride + column + v * NATIVE);
    for (int i = 0; i < n; i++) {
        for (int line = 0; line < ahead.rate; line++) __builtin_prefetch(*ahead.lines++, 0, 2);  // to L2
        const auto *row = b.row(i) + column;
        native values[N];
        for (int v = 0; v < N; v++) values[v] = Rows::values(row + v * NATIVE);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < N; v++) sums[m][v] = Op::add(sums[m][v], a[m * a_stride + i], values[v]);
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < N; v++) memcpy(c + m * c_stride + column + v * NATIVE, &sums[m][v], sizeof(native));
}

template <class Op, int N, class Rows>
inline void multiply_columns(
    const float *a, int m, size_t a_stride, const Rows &b, int n, int column, float *c, size_t c_stride, bool add,
    Ahead ahead
) {
    const int tiles = (m + TILE_QUERIES - 1) / TILE_QUERIES;
    for (int tile = 0, q = 0; tile < tiles; tile++) {
        const int size = (m - q + tiles - tile - 1) / (tiles - tile);
        const float *from = a + q * a_stride;
        float *to = c + q * c_stride;
        switch (size) {
            case 1: multiply_tile<Op, 1, N>(from, a_stride, b, n, column, to, c_stride, add, ahead); break;
            case 2: multiply_tile<Op, 2, N>(from, a_stride, b, n, column, to, c_stride, add, ahead); break;
            case 3: multiply_tile<Op, 3, N>(from, a_stride, b, n, column, to, c_stride, add, ahead); break;
            case 4: multiply_tile<Op, 4, N>(from, a_stride, b, n, column, to, c_stride, add, ahead); break;
            case 5: multiply_tile<Op, 5, N>(from, a_stride, b, n, column, to, c_stride, add, ahead); break;
            default: multiply_tile<Op, 6, N>(from, a_stride, b, n, column, to, c_stride, add, ahead);
        }
        q += size, ahead = {};
    }
}

// c (m, columns) = or += a (m, n words) times b (n, columns); columns are a multiple of LANES.
template <class Op, class Rows>
inline void multiply_panel(
    const float *a, int m, size_t a_stride, const Rows &b, int n, int columns, float *c, size_t c_stride, bool add,
    Ahead ahead
) {
    int column = 0;
    for (; column + TILE_VECTORS * NATIVE <= columns; column += TILE_VECTORS * NATIVE)
        multiply_columns<Op, TILE_VECTORS>(a, m, a_stride, b, n, column, c, c_stride, add, column ? Ahead{} : ahead);
    for (; column < columns; column += NATIVE)
        multiply_columns<Op, 1>(a, m, a_stride, b, n, column, c, c_stride, add, column ? Ahead{} : ahead);
}

// Words of four rows, interleaved in each group of four lanes.
inline native_words zip_low(native_words a, native_words b) {
#if defined(__AVX512F__)
    return (native_words)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (native_words)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
#else
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
inline native_words zip_high(native_words a, native_words b) {
#if defined(__AVX512F__)
    return (native_words)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (native_words)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
#else
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Four words of every fourth row: of `from`, and of the rows 4, 8 and 12 after it as far as a vector has lanes.
inline native_words every_fourth(const uint8_t *from, [[maybe_unused]] size_t stride) {
#if defined(__AVX512F__)
    auto row = [&](int i) { return _mm_loadu_si128((const __m128i *)(from + i * stride)); };
    __m512i v = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(4), 1);
    return (native_words)_mm512_inserti32x4(_mm512_inserti32x4(v, row(8), 2), row(12), 3);
#elif defined(__AVX2__)
    auto row = [&](int i) { return _mm_loadu_si128((const __m128i *)(from + i * stride)); };
    return (native_words)_mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(4), 1);
#else
    return load<native_words>(from);
#endif
}

// Turns four words of NATIVE rows: words[i] has word i of each row.
inline void turn(const uint8_t *from, size_t stride, native_words words[4]) {
    native_words a[4], b[4];
    for (int i = 0; i < 4; i++) a[i] = every_fourth(from + i * stride, stride);
    b[0] = zip_low(a[0], a[2]), b[1] = zip_high(a[0], a[2]), b[2] = zip_low(a[1], a[3]), b[3] = zip_high(a[1], a[3]);
    words[0] = zip_low(b[0], b[2]), words[1] = zip_high(b[0], b[2]);
    words[2] = zip_low(b[1], b[3]), words[3] = zip_high(b[1], b[3]);
}
