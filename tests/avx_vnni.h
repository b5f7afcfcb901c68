// Stands in for AVX-VNNI, which processors have that lack AVX-512, so that the products that use it are tested on others.
// A compiler gets it by -include, before the kernels' own source.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 dot_of_bytes

// Adds to each number of 32 bits the products of four bytes without a sign with four that have one.
inline __m256i dot_of_bytes(__m256i sums, __m256i unsigned_bytes, __m256i signed_bytes) {
    int32_t total[8];
    uint8_t a[32];
    int8_t b[32];
    memcpy(total, &sums, 32);
    memcpy(a, &unsigned_bytes, 32);
    memcpy(b, &signed_bytes, 32);
    for (int i = 0; i < 32; i++) total[i / 4] += a[i] * b[i];
    memcpy(&sums, total, 32);
    return sums;
}
