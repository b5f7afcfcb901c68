// Vectors of 16 lanes in the compiler's own extension (GCC and Clang): one source for AVX-512, AVX2 and NEON.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;

#if defined(__AVX512F__) || defined(__clang__)
typedef float f32 __attribute__((vector_size(64)));
typedef int32_t i32 __attribute__((vector_size(64)));
typedef uint32_t u32 __attribute__((vector_size(64)));
#else
#define PAIRS 1
#include "pairs.h"
typedef Vector<float, 64>::type f32;
typedef Vector<int32_t, 64>::type i32;
typedef Vector<uint32_t, 64>::type u32;
#endif
typedef uint8_t u8 __attribute__((vector_size(16)));
typedef uint16_t u16 __attribute__((vector_size(32)));

// Loads at any alignment, as pointers into mapped files have none.
template <class V> inline V load(const void *from) {
#if defined(PAIRS)
    return load_pair<V>(from);
#else
    V v;
    memcpy(&v, from, sizeof v);
    return v;
#endif
}

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12 && !defined(PAIRS)
// The name that Clang and later versions of GCC have for it.
#define __builtin_shufflevector(a, b, ...) __builtin_shuffle(a, b, decltype((a) < (b)){__VA_ARGS__})
#endif

// Lanes of a where the mask is set, and of b elsewhere.
template <class M, class V> inline V pick(M mask, V a, V b) {
#if defined(PAIRS)
    return pick_pair(mask, a, b);
#else
    return mask ? a : b;
#endif
}

template <class V> inline void store(void *to, V v) {
#if defined(PAIRS)
    store_pair(to, v);
#else
    memcpy(to, &v, sizeof v);
#endif
}

// The registers that a vector fills. A vector that is not a pair counts as one: the compiler splits it, where it has to.
#if defined(PAIRS)
template <class V> constexpr int REGISTERS = 1;
template <class H> constexpr int REGISTERS<Pair<H>> = 2 * REGISTERS<H>;
#else
template <class V> constexpr int REGISTERS = 1;
#endif

// One of them, by its number.
template <int I, class V> inline auto part(const V &v) {
#if defined(PAIRS)
    if constexpr (IsPair<V>::value) {
        constexpr int HALF = REGISTERS<V> / 2;
        if constexpr (I < HALF) return part<I>(v.low);
        else return part<I - HALF>(v.high);
    } else {
        return v;
    }
#else
    return v;
#endif
}

inline f32 all(float x) { return x - f32{}; }  // x in every lane

// In two conversions: GCC 12 splits a direct one from bytes into single lanes.
inline i32 widened(u8 v) { return __builtin_convertvector(__builtin_convertvector(v, u16), i32); }

// With AVX-512 by its own names: GCC 12 widens one half after the other, and one permutation of bytes does all.
inline f32 from_bf16(u16 v) {
#if defined(__AVX512VBMI__)
    constexpr uint64_t HIGH_BYTES = 0xcccccccccccccccc;
    const __m512i places = (__m512i)(u32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x02020000 + 0x01000000);
    return (f32)_mm512_maskz_permutexvar_epi8(HIGH_BYTES, places, _mm512_castsi256_si512((__m256i)v));
#elif defined(__AVX512F__)
    return (f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
#else
    return (f32)(__builtin_convertvector(v, u32) << 16);
#endif
}

// Keeps compilers from loading a value again for each use.
inline void keep_in_register(f32 &v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#else
    (void)v;
#endif
}

// From fp16. Subnormal numbers go through integers, as processors are slow with subnormal floats.
inline f32 from_half(u16 v) {
#if defined(__AVX512F__)
    return (f32)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
    __m128i halves[2];
    memcpy(halves, &v, sizeof v);
    __m256 floats[2] = {_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])};
    f32 both;
    memcpy(&both, floats, sizeof both);
    return both;
#else
    u32 bits = __builtin_convertvector(v, u32);
    u32 magnitude = bits & 0x7fff;
    f32 subnormal = __builtin_convertvector((i32)magnitude, f32) * 0x1p-24f;
    u32 normal = (magnitude << 13) + (112 << 23);
    u32 special = normal + (112 << 23);  // infinite or NaN
    u32 moved = pick(magnitude < 0x400, (u32)subnormal, pick(magnitude < 0x7c00, normal, special));
    return (f32)(moved | (bits & 0x8000) << 16);
#endif
}

inline float from_bf16(uint16_t v) {
    uint32_t bits = uint32_t(v) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline float from_half(uint16_t v) {
    u16 all_lanes = v - u16{};
    return from_half(all_lanes)[0];
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline u16 to_bf16(f32 v) {
    u32 bits = (u32)v;
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector(pick(v == v, bits, bits * 0 + 0x7fc0), u16);
}

inline uint16_t to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) {  // subnormal: rounded by an addition in fp32
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return sign | uint16_t(bits - 0x3f000000);
    }
    return sign | uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

// The sum of the lanes, always in the same order: see D30.
inline float sum(f32 v) {
    typedef float f8 __attribute__((vector_size(32)));
    typedef float f4 __attribute__((vector_size(16)));
    f8 halves[2];
    memcpy(halves, &v, 64);
    f8 eight = halves[0] + halves[1];
    f4 quarters[2];
    memcpy(quarters, &eight, 32);
    f4 four = quarters[0] + quarters[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x to about 2 units in the last place; x is clamped to [-87, 88], which fp32 can express.
inline f32 exponential(f32 x) {
    x = pick(x < -87.0f, all(-87.0f), x);
    x = pick(x > 88.0f, all(88.0f), x);
    f32 shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits of the mantissa
    f32 n = shifted - 12582912.0f;
    f32 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (f32)((__builtin_convertvector(n, i32) + 127) << 23);
}

// 2^x to about 2 units in the last place, for x up to 127; 0 below -126.
inline f32 power_of_two(f32 x) {
    f32 shifted = x + 12582912.0f;  // rounds to an integer in the low bits of the mantissa
    f32 r = x - (shifted - 12582912.0f);
    f32 p = r * 1.32647e-3f + 9.67151e-3f;
    p = p * r + 5.550734e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.9314698e-1f;
    p = p * r + 1.0f;
    p = (f32)((u32)p + ((u32)shifted << 23));
    return pick(x < -126.0f, f32{}, p);
}
