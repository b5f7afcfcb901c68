// The small operations between the matrix products of many tokens. What they read and write has one type of floats.
#pragma once
#include "step.h"

// x (n, dim) += delta, if there is one; y = its norm.
extern "C" void fused_add_rms_norm(
    float *x, const void *delta, const float *weight, float eps, int n, int dim, void *y, int type, int threads
) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> row(dim);
#pragma omp for
        for (int t = 0; t < n; t++) {
            float *mine = x + size_t(t) * dim;
            if (delta) {
                read_floats(delta, type, size_t(t) * dim, dim, row.data());
                add_share(mine, 1.0f, row.data(), dim);
            }
            if (!y) continue;
            norm(mine, weight, dim, eps, row.data());
            write_floats(y, type, size_t(t) * dim, dim, row.data());
        }
    }
}

// gates = silu(gates) * ups
extern "C" void silu_and_mul(void *gates, const void *ups, size_t n, int type, int threads) {
    constexpr size_t PIECE = 1024;
#pragma omp parallel for num_threads(threads)
    for (size_t first = 0; first < n; first += PIECE) {
        float a[PIECE] = {}, b[PIECE] = {};
        const int size = int(std::min(PIECE, n - first));
        read_floats(gates, type, first, size, a);
        read_floats(ups, type, first, size, b);
        for (int i = 0; i < size; i += LANES) store(a + i, silu(load<f32>(a + i)) * load<f32>(b + i));
        write_floats(gates, type, first, size, a);
    }
}

// Rotates q (n, q_dim) in place, and k (n, kv_dim) on its way into the cache; v goes there as it is. All have the
// cache's type.
extern "C" void rope_and_append_kv(const LayersInput *step, int layer, void *q, const void *k, const void *v) {
    const LayersInput &s = *step;
    const int q_dim = s.n_heads * s.head_dim, kv_dim = s.n_kv_heads * s.head_dim, size = value_bytes(s.cache_type);
#pragma omp parallel num_threads(s.threads)
    {
        std::vector<float> row(std::max(q_dim, kv_dim));
        auto turned = [&](const void *from, int t, int n) {
            read_floats(from, s.cache_type, size_t(t) * n, n, row.data());
            const float *rotation = s.rotation + size_t(t) * s.head_dim;
            for (int head = 0; head < n; head += s.head_dim)
                for (int i = 0; i < s.head_dim; i += 2) turn(rotation + i, row.data() + head + i);
        };
#pragma omp for
        for (int t = 0; t < s.n_tokens; t++) {
            turned(q, t, q_dim);
            write_floats(q, s.cache_type, size_t(t) * q_dim, q_dim, row.data());
            turned(k, t, kv_dim);
            size_t at = slot(s, layer, t);
            write_floats(s.keys, s.cache_type, at, kv_dim, row.data());
            memcpy(s.values + at * size, (const uint8_t *)v + size_t(t) * kv_dim * size, size_t(kv_dim) * size);
        }
    }
}
