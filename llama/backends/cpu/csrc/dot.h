// Dot products of codes of weights with activations of 16 bits, in whole numbers: sums are exact, in any order.
//
// An activation is a whole number of 16 bits. Four of them, in adjacent columns, are kept as two words of 32 bits that
// suit the processor's instructions, `Quad`; four codes are a word of four bytes in each lane, which `Factors` splits
// into what the two words are multiplied with.
#pragma once
#include "vectors.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

typedef int16_t i16 __attribute__((vector_size(32)));

// The greatest activation in magnitude.
constexpr int MAX_ACTIVATION = 127 * 256 + 127;

struct Quad {
    int32_t first, second;
};

template <class U> struct Factors {
    U first, second;
};

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512BW__)) || defined(__ARM_FEATURE_DOTPROD)
// Instructions that multiply four bytes: an activation is 256 times its first digit plus its second one.
inline void quads_of(i32 activations, Quad *to, int stride) {
    typedef int8_t i8x16 __attribute__((vector_size(16)));
    i32 high = (activations + 128) >> 8;
    // In two conversions, see `widened`.
    i8x16 first = __builtin_convertvector(__builtin_convertvector(high, i16), i8x16);
    i8x16 second = __builtin_convertvector(__builtin_convertvector(activations - (high << 8), i16), i8x16);
    int32_t firsts[4], seconds[4];
    memcpy(firsts, &first, 16);
    memcpy(seconds, &second, 16);
    for (int i = 0; i < 4; i++) to[i * stride] = {firsts[i], seconds[i]};
}
constexpr bool DIGITS = true;
template <class U> inline Factors<U> factors(U codes) { return {codes, codes}; }
#else
// Instructions that multiply two numbers of 16 bits: the words are the even and the odd columns.
inline void quads_of(i32 activations, Quad *to, int stride) {
    i16 v = __builtin_convertvector(activations, i16);
    i16 pairs = __builtin_shufflevector(v, v, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    Quad quads[4];
    memcpy(quads, &pairs, sizeof pairs);
    for (int i = 0; i < 4; i++) to[i * stride] = quads[i];
}
template <class U> inline Factors<U> factors(U codes) { return {codes & 0x00ff00ff, codes >> 8 & 0x00ff00ff}; }
constexpr bool DIGITS = false;
#endif

// Tokens that are multiplied together, as many as there are registers for their sums.
#if defined(__AVX512F__)
constexpr int MAX_BATCH = 8;
#else
constexpr int MAX_BATCH = DIGITS ? 4 : 8;
#endif

// What is subtracted from bytes that stand for signed numbers: 128, or 0 where instructions take signed bytes alone.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int BYTE_OFFSET = 0;
#else
constexpr int BYTE_OFFSET = 128;
#endif

// Bytes of a register that the instructions below work on; all of a vector where there are none.
#if defined(__AVX512F__)
constexpr int DOT_REGISTER = 64;
#elif defined(__AVX2__)
constexpr int DOT_REGISTER = 32;
#elif defined(__ARM_NEON)
constexpr int DOT_REGISTER = 16;
#else
constexpr int DOT_REGISTER = 64;
#endif

// Adds to each lane of a register the products of one word of a quad with that lane's factors.
template <class V, class U> inline V register_dot(V sums, U factors, const int32_t &word) {
#if defined(__AVX512VNNI__)
    return (V)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)factors, _mm512_set1_epi32(word));
#elif defined(__AVX512BW__)
    return sums + (V)_mm512_madd_epi16((__m512i)factors, _mm512_set1_epi32(word));
#elif defined(__AVX2__) && !defined(__AVX512F__) && defined(__AVXVNNI__)
    return (V)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)factors, _mm256_set1_epi32(word));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    // In assembly, as GCC 12 loads words to memory first, and adds up products only at the end.
    V words, products;
    asm("vpbroadcastd %1, %0" : "=x"(words) : "m"(word));
    asm("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(factors), "x"(words));
    sums += products;
    asm("" : "+x"(sums));
    return sums;
#elif defined(__ARM_FEATURE_DOTPROD)
    return (V)vdotq_s32((int32x4_t)sums, (int8x16_t)factors, vreinterpretq_s8_s32(vdupq_n_s32(word)));
#elif defined(__ARM_NEON)
    const int16x8_t f = (int16x8_t)factors, w = vreinterpretq_s16_s32(vdupq_n_s32(word));
    const int32x4_t low = vmull_s16(vget_low_s16(f), vget_low_s16(w)), high = vmull_high_s16(f, w);
    return sums + (V)vpaddq_s32(low, high);
#else
    V low = (V)(factors << 16) >> 16, high = (V)factors >> 16;
    return sums + low * int32_t(int16_t(word)) + high * (word >> 16);
#endif
}

// The same of all lanes.
#if defined(PAIRS)
template <class V, class U> inline V add_dot(V sums, U factors, const int32_t &word) {
    if constexpr (!IsPair<V>::value) return register_dot(sums, factors, word);
    else return {add_dot(sums.low, factors.low, word), add_dot(sums.high, factors.high, word)};
}
#else
inline i32 add_dot(i32 sums, u32 factors, const int32_t &word) {
    if constexpr (DOT_REGISTER == sizeof(i32)) return register_dot(sums, factors, word);
    typedef int32_t Ints __attribute__((vector_size(DOT_REGISTER)));
    typedef uint32_t Words __attribute__((vector_size(DOT_REGISTER)));
    Ints s[sizeof(i32) / DOT_REGISTER];
    Words f[sizeof(i32) / DOT_REGISTER];
    memcpy(s, &sums, sizeof s);
    memcpy(f, &factors, sizeof f);
    for (size_t i = 0; i < sizeof(i32) / DOT_REGISTER; i++) s[i] = register_dot(s[i], f[i], word);
    memcpy(&sums, s, sizeof s);
    return sums;
}
#endif

// Adds to each lane the products of four codes with four activations; `high` are those of first digits, if there are
// digits.
template <class V, class U> inline void add_products(V &high, V &low, const Factors<U> &codes, const Quad &quad) {
    if constexpr (DIGITS) {
        high = add_dot(high, codes.first, quad.first);
        low = add_dot(low, codes.second, quad.second);
    } else {
        low = add_dot(add_dot(low, codes.first, quad.first), codes.second, quad.second);
    }
}

template <class V> inline V total(V high, V low) {
    if constexpr (DIGITS) return (high << 8) + low;
    return low;
}

// Looks up each byte, 0 to 15, in a table of 16 bytes.
inline u32 look_up(const uint8_t *table, u32 indices) {
#if defined(__AVX512BW__)
    return (u32)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), (__m512i)indices);
#elif defined(__AVX2__)
    __m256i v[2], all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    memcpy(v, &indices, 64);
    for (int i = 0; i < 2; i++) v[i] = _mm256_shuffle_epi8(all, v[i]);
    memcpy(&indices, v, 64);
    return indices;
#elif defined(__ARM_NEON)
    uint8x16_t v[4], all = vld1q_u8(table);
    memcpy(v, &indices, 64);
    for (int i = 0; i < 4; i++) v[i] = vqtbl1q_u8(all, v[i]);
    memcpy(&indices, v, 64);
    return indices;
#else
    uint8_t bytes[64];
    memcpy(bytes, &indices, 64);
    for (uint8_t &byte : bytes) byte = table[byte];
    memcpy(&indices, bytes, 64);
    return indices;
#endif
}
