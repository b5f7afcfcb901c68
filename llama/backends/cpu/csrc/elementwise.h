// The elementwise operations between the matrix products of many tokens. All that they read and write beside the
// residual and norm weights has one type of floats.
#pragma once
#include "layers.h"

// x (n, dim) += the norm of delta, if there is one; y = the norm of x, if there is a y. What has no weight is no norm.
extern "C" void fused_add_norm(
    float *x, const void *delta, const Norm *of_delta, const Norm *of_sum, float eps, int n, int dim, void *y, int type,
    int threads
) {
    parallel(threads, [&](int thread, int size) {
        std::vector<float> row(dim);
        Share share(n, thread, size);
        for (int t = share.start; t < share.stop; t++) {
            float *residual = x + size_t(t) * dim;
            if (delta) {
                read_floats(delta, type, size_t(t) * dim, dim, row.data());
                if (of_delta->weight) normalise(row.data(), *of_delta, dim, eps, row.data());
                add_scaled(residual, 1.0f, row.data(), dim);
            }
            if (!y) continue;
            if (of_sum->weight) normalise(residual, *of_sum, dim, eps, row.data());
            write_floats(y, type, size_t(t) * dim, dim, of_sum->weight ? row.data() : residual);
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

// Normalises and rotates q (n, q_dim) in place, as the layer does; writes k (n, kv_dim), turned alike, and v to the cache.
// All have the cache's type.
extern "C" void rope_and_append_kv(
    const Layer *layers, int layer, const LayersInput *inputs, void *q, const void *k, const void *v
) {
    const LayersInput &in = *inputs;
    const Layer &w = layers[layer];
    const int q_dim = in.n_heads * in.head_dim, kv_dim = in.n_kv_heads * in.head_dim, bytes = value_bytes(in.cache_type);
    parallel(in.threads, [&](int thread, int size) {
        std::vector<float> row(std::max(q_dim, kv_dim));
        auto turn = [&](const void *from, int t, int heads, const float *norm, int rotation) {
            const int n = heads * in.head_dim;
            read_floats(from, in.cache_type, size_t(t) * n, n, row.data());
            turn_heads(row.data(), heads, in.head_dim, w.head_norm, norm, rotation_of(in, rotation, t), in.eps);
        };
        Share share(in.n_tokens, thread, size);
        for (int t = share.start; t < share.stop; t++) {
            turn(q, t, in.n_heads, w.q_norm, w.q_rotation);
            write_floats(q, in.cache_type, size_t(t) * q_dim, q_dim, row.data());
            turn(k, t, in.n_kv_heads, w.k_norm, w.k_rotation);
            size_t at = index_of_token(in, layer, t);
            write_floats(in.keys, in.cache_type, at, kv_dim, row.data());
            memcpy(in.values + at * bytes, (const uint8_t *)v + size_t(t) * kv_dim * bytes, size_t(kv_dim) * bytes);
        }
    });
}
