// Norms and rotations of a token's values.
#pragma once
#include <cmath>

#include "vectors.h"

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

// a * b + c, rounded once where the processor does that: of two products in a sum, compilers choose which one is not
// rounded, in each place anew.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Multiplies an adjacent pair, as a complex number, by the complex number of its rotation.
inline void rotate_pair(const float *rotation, float *pair) {
    float real = fused(pair[0], rotation[0], -(pair[1] * rotation[1]));
    float imaginary = fused(pair[0], rotation[1], pair[1] * rotation[0]);
    pair[0] = real, pair[1] = imaginary;
}

struct Norm {
    const float *weight;  // null: there is no norm
    const float *bias;  // null: RMSNorm; else LayerNorm
};

inline float rms_scale(const float *x, int n, float eps) { return 1.0f / std::sqrt(dot(x, x, n) / float(n) + eps); }

// y = x * scale * weight
inline void scaled(const float *x, float scale, const float *weight, int n, float *y) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, load<f32>(x + i) * scale * load<f32>(weight + i));
    for (; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// Makes y of x (n), which may be the same. In one place, so that all who compute it round alike.
__attribute__((noinline)) inline void normalise(const float *x, const Norm &norm, int n, float eps, float *y) {
    if (!norm.bias) return scaled(x, rms_scale(x, n, eps), norm.weight, n, y);
    f32 sums{};
    float rest = 0;
    int i = 0;
    for (; i + LANES <= n; i += LANES) sums += load<f32>(x + i);
    for (; i < n; i++) rest += x[i];
    const float mean = (sum(sums) + rest) / float(n);
    for (i = 0; i + LANES <= n; i += LANES) store(y + i, load<f32>(x + i) - mean);
    for (; i < n; i++) y[i] = x[i] - mean;
    scaled(y, rms_scale(y, n, eps), norm.weight, n, y);
    add_scaled(y, 1.0f, norm.bias, n);
}

// What is normalised of a layer's queries and keys: nothing, each head before its rotation, each after it, all heads
// together before it, or the same by the caller, as they are of several ranks.
enum HeadNorm { NO_HEAD, HEAD, ROTATED_HEAD, ALL_HEADS, HEADS_OF_RANKS };

// Normalises and rotates n heads of a token, in place; rotation: (head_dim / 2) complex numbers.
inline void turn_heads(
    float *heads, int n, int head_dim, int kind, const float *weight, const float *rotation, float eps
) {
    if (kind == ALL_HEADS) normalise(heads, {weight, nullptr}, n * head_dim, eps, heads);
    for (float *head = heads; head < heads + size_t(n) * head_dim; head += head_dim) {
        if (kind == HEAD) normalise(head, {weight, nullptr}, head_dim, eps, head);
        for (int i = 0; i < head_dim; i += 2) rotate_pair(rotation + i, head + i);
        if (kind == ROTATED_HEAD) normalise(head, {weight, nullptr}, head_dim, eps, head);
    }
}
