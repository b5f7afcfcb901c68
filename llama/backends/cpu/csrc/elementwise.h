// The elementwise operations between the matrix products of many tokens. All that they read and write beside the
// residual and norm weights has one type of floats.
#pragma once
#include "layers.h"

// x (n, dim) += delta, if there is one; y = its RMSNorm, if there is a y.
extern "C" void fused_add_rms_norm(
    float *x, const void *delta, const float *weight, float eps, int n, int dim, void *y, int type, int threads
) {
    parallel(threads, [&](int thread, int size) {
        std::vector<float> row(dim);
        Share share(n, thread, size);
        for (int t = share.start; t < share.stop; t++) {
            float *residual = x + size_t(t) * dim;
            if (delta) {
                read_floats(delta, type, size_t(t) * dim, dim, row.data());
                add_scaled(residual, 1.0f, row.data(), dim);
            }
            if (!y) continue;
            rms_norm(residual, weight, dim, eps, row.data());
            write_floats(y, type, size_t(t) * dim, dim, row.data());
        }
    });
}

// values = silu(values) * ups, or another activation of values, which has no ups.
extern "C" void activate(const Activation *activation, void *values, const void *ups, size_t n, int type, int threads) {
    constexpr size_t PIECE = 1024;
    parallel_for(threads, int((n + PIECE - 1) / PIECE), [&](int piece) {
        const size_t first = piece * PIECE;
        float a[PIECE] = {}, b[PIECE] = {};
        const int size = int(std::min(PIECE, n - first));
        read_floats(values, type, first, size, a);
        if (ups) read_floats(ups, type, first, size, b);
        for (int i = 0; i < size; i += LANES) {
            if (activation->kind == SILU) store(a + i, silu(load<f32>(a + i)) * load<f32>(b + i));
            else activate(*activation, a + i);
        }
        write_floats(values, type, first, size, a);
    });
}

// Rotates q (n, q_dim) in place, and writes k (n, kv_dim), rotated, and v to the cache. All have the cache's type.
extern "C" void rope_and_append_kv(const LayersInput *inputs, int layer, void *q, const void *k, const void *v) {
    const LayersInput &in = *inputs;
    const int q_dim = in.n_heads * in.head_dim, kv_dim = in.n_kv_heads * in.head_dim, bytes = value_bytes(in.cache_type);
    parallel(in.threads, [&](int thread, int size) {
        std::vector<float> row(std::max(q_dim, kv_dim));
        auto rotate = [&](const void *from, int t, int n) {
            read_floats(from, in.cache_type, size_t(t) * n, n, row.data());
            const float *rotation = in.rotation + size_t(t) * in.head_dim;
            for (int head = 0; head < n; head += in.head_dim)
                for (int i = 0; i < in.head_dim; i += 2) rotate_pair(rotation + i, row.data() + head + i);
        };
        Share share(in.n_tokens, thread, size);
        for (int t = share.start; t < share.stop; t++) {
            rotate(q, t, q_dim);
            write_floats(q, in.cache_type, size_t(t) * q_dim, q_dim, row.data());
            rotate(k, t, kv_dim);
            size_t at = index_of_token(in, layer, t);
            write_floats(in.keys, in.cache_type, at, kv_dim, row.data());
            memcpy(in.values + at * bytes, (const uint8_t *)v + size_t(t) * kv_dim * bytes, size_t(kv_dim) * bytes);
        }
    });
}
