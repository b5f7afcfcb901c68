// Attention of single tokens over the cache, in parts of PART keys, so that threads can share a long sequence. Parts do
// not depend on the number of threads or on other tokens, and so neither do results: see D30.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "weights.h"

constexpr int PAGE_SIZE = 16;  // positions of a page of the cache, as in cache.py
constexpr int PART = 256;  // keys

inline float dot(const float *a, const float *b, int n) {
    f32 products{};
    int i = 0;
    for (; i + LANES <= n; i += LANES) products += load<f32>(a + i) * load<f32>(b + i);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return sum(products) + rest;
}

// to += scale * v
inline void add_scaled(float *to, float scale, const float *v, int n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load<f32>(to + i) + scale * load<f32>(v + i));
    for (; i < n; i++) to[i] += scale * v[i];
}

// The sums of 16 vectors, that of v[i] in lane i. Halves of two vectors at a time are added until one vector is left.
inline f32 sums_of(const f32 *v) {
    f32 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++)
        a[i] = __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               __builtin_shufflevector(b[i], b[i + 2], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    f32 d = __builtin_shufflevector(c[0], c[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
            __builtin_shufflevector(c[0], c[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return __builtin_shufflevector(d, d, 0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15);
}

// The slot of a position of a row: its place among the positions of all pages.
inline size_t slot(const int32_t *pages, int64_t position) {
    return size_t(pages[position / PAGE_SIZE]) * PAGE_SIZE + position % PAGE_SIZE;
}

// Attention of the `group` query heads of one KV head over keys [start, stop) of the row that has these pages. `keys`
// and `values` point at that head's key and value of slot 0; those of successive slots are `stride` numbers apart. out:
// for each head its greatest score, its sum of exponentials, and the weighted sum of values, head_dim + 2 floats.
inline void attend_part(
    const float *q, int group, int head_dim, const uint8_t *keys, const uint8_t *values, int type, size_t stride,
    const int32_t *pages, int start, int stop, float *out
) {
    static thread_local std::vector<float> scores, sixteen, queries, sums;
    const int width = (head_dim + LANES - 1) / LANES * LANES, vectors = width / LANES;
    const float scale = 1.0f / std::sqrt(float(head_dim));
    const int n = stop - start, padded = (n + LANES - 1) / LANES * LANES;
    scores.resize(size_t(group) * PART);
    sixteen.assign(size_t(LANES) * width, 0.0f);  // keys or values, as floats
    queries.assign(size_t(group) * width, 0.0f);
    sums.assign(size_t(group) * width, 0.0f);
    for (int h = 0; h < group; h++) std::copy_n(q + h * head_dim, head_dim, queries.data() + h * width);
    size_t at[PART];
    for (int i = 0; i < n; i++) at[i] = slot(pages, start + i) * stride;
    const int bytes = value_bytes(type), head_bytes = head_dim * bytes;
    auto read = [&](const uint8_t *from, int first) {
        for (int i = first; i < std::min(first + LANES, n); i++) {
            if (i + LANES < n)
                for (int b = 0; b < head_bytes; b += 64) __builtin_prefetch(from + at[i + LANES] * bytes + b);
            read_floats(from, type, at[i], head_dim, sixteen.data() + (i - first) * width);
        }
    };
    for (int first = 0; first < n; first += LANES) {
        read(keys, first);
        for (int h = 0; h < group; h++) {
            f32 products[LANES] = {};
            for (int v = 0; v < vectors; v++) {
                f32 query = load<f32>(queries.data() + h * width + v * LANES);
                for (int i = 0; i < LANES; i++)
                    products[i] += query * load<f32>(sixteen.data() + i * width + v * LANES);
            }
            store(scores.data() + h * PART + first, scale * sums_of(products));
        }
    }
    for (int h = 0; h < group; h++) {
        float *head_scores = scores.data() + h * PART, *result = out + h * (head_dim + 2);
        float greatest = *std::max_element(head_scores, head_scores + n);
        f32 total{};
        for (int i = 0; i < padded; i += LANES) {
            f32 weights = exponential(load<f32>(head_scores + i) - greatest);
            for (int lane = std::max(0, n - i); lane < LANES; lane++) weights[lane] = 0;
            store(head_scores + i, weights);
            total += weights;
        }
        result[0] = greatest;
        result[1] = sum(total);
    }
    for (int first = 0; first < n; first += LANES) {
        read(values, first);
        const int count = std::min(LANES, n - first);
        for (int h = 0; h < group; h++)
            for (int v = 0; v < vectors; v++) {
                float *to = sums.data() + h * width + v * LANES;
                f32 total = load<f32>(to);
                for (int i = 0; i < count; i++)
                    total += scores[h * PART + first + i] * load<f32>(sixteen.data() + i * width + v * LANES);
                store(to, total);
            }
    }
    for (int h = 0; h < group; h++) std::copy_n(sums.data() + h * width, head_dim, out + h * (head_dim + 2) + 2);
}

// Merges the parts of one head, `stride` floats apart: y (head_dim).
inline void merge_parts(const float *parts, int n_parts, size_t stride, int head_dim, float *y) {
    float greatest = -INFINITY, total = 0;
    for (int p = 0; p < n_parts; p++) greatest = std::max(greatest, parts[p * stride]);
    std::fill(y, y + head_dim, 0.0f);
    for (int p = 0; p < n_parts; p++) {
        float weight = exponential(all(parts[p * stride] - greatest))[0];
        total += weight * parts[p * stride + 1];
        add_scaled(y, weight, parts + p * stride + 2, head_dim);
    }
    for (int i = 0; i < head_dim; i++) y[i] /= total;
}
