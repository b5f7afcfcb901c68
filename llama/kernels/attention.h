// Attention of single tokens over the cache: in parts of PART keys, so that threads share long sequences, and the
// result depends neither on their number nor on what else is computed.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "weights.h"

constexpr int PART = 256;  // keys

inline float dot(const float *a, const float *b, int n) {
    f32 products{};
    int i = 0;
    for (; i + LANES <= n; i += LANES) products += load<f32>(a + i) * load<f32>(b + i);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return sum(products) + rest;
}

// to += share * v
inline void add_share(float *to, float share, const float *v, int n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load<f32>(to + i) + share * load<f32>(v + i));
    for (; i < n; i++) to[i] += share * v[i];
}

// What `group` query heads of one KV head make of keys [start, stop). `keys` and `values` point at the row's first key
// of that head; keys are `stride` values apart. out: a head's greatest score, its sum of exponentials, and the
// weighted sum of values, head_dim + 2 floats a head.
inline void attend_part(
    const float *q, int group, int head_dim, const uint8_t *keys, const uint8_t *values, int type, size_t stride,
    int start, int stop, float *out
) {
    static thread_local std::vector<float> scores, vector;
    scores.resize(size_t(group) * PART), vector.resize(head_dim);
    const float scale = 1.0f / std::sqrt(float(head_dim));
    const int n = stop - start, padded = (n + LANES - 1) / LANES * LANES;
    for (int i = 0; i < n; i++) {
        read_floats(keys, type, size_t(start + i) * stride, head_dim, vector.data());
        for (int h = 0; h < group; h++) scores[h * PART + i] = scale * dot(q + h * head_dim, vector.data(), head_dim);
    }
    for (int h = 0; h < group; h++) {
        float *mine = scores.data() + h * PART, *result = out + h * (head_dim + 2);
        float greatest = *std::max_element(mine, mine + n);
        std::fill(mine + n, mine + padded, -INFINITY);
        f32 total{};
        for (int i = 0; i < padded; i += LANES) {
            f32 share = exponential(load<f32>(mine + i) - greatest);
            for (int lane = std::max(0, n - i); lane < LANES; lane++) share[lane] = 0;
            store(mine + i, share);
            total += share;
        }
        result[0] = greatest;
        result[1] = sum(total);
        std::fill(result + 2, result + 2 + head_dim, 0.0f);
    }
    for (int i = 0; i < n; i++) {
        read_floats(values, type, size_t(start + i) * stride, head_dim, vector.data());
        for (int h = 0; h < group; h++)
            add_share(out + h * (head_dim + 2) + 2, scores[h * PART + i], vector.data(), head_dim);
    }
}

// Joins the parts of one head, `stride` floats apart: y (head_dim).
inline void join_parts(const float *parts, int n_parts, size_t stride, int head_dim, float *y) {
    float greatest = -INFINITY, total = 0;
    for (int p = 0; p < n_parts; p++) greatest = std::max(greatest, parts[p * stride]);
    std::fill(y, y + head_dim, 0.0f);
    for (int p = 0; p < n_parts; p++) {
        float share = exponential(all(parts[p * stride] - greatest))[0];
        total += share * parts[p * stride + 1];
        add_share(y, share, parts + p * stride + 2, head_dim);
    }
    for (int i = 0; i < head_dim; i++) y[i] /= total;
}
