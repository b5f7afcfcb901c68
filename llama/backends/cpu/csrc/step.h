// A few tokens through transformer layers in one call: norms, products, rotation, cache, attention and feed-forward.
#pragma once
#include "attention.h"
#include "team.h"

constexpr int MAX_GEMV_TOKENS = 16;  // FEW in ops.py

struct Layer {
    Weight wq, wk, wv, wo, w1, w2, w3;
    const float *attention_norm, *ffn_norm;
};

struct LayersInput {
    int32_t n_tokens, seqlen;  // of rows after one another, seqlen each
    int32_t dim, n_heads, n_kv_heads, head_dim, hidden_dim, cache_type;
    int64_t window;  // how many keys a query sees
    const int64_t *positions;  // (n_tokens)
    const float *rotation;  // (n_tokens, head_dim / 2) complex numbers
    uint8_t *keys, *values;  // of layer 0, row 0
    int64_t layer_stride, row_stride;  // in values of the cache
    float *x;  // (n_tokens, dim): the sum that layers add to
    float *out;  // x itself, or where this rank's share of a half's result goes
    float eps;
    int32_t threads;
};

// Where in the cache token t's key and value begin, in values.
inline size_t slot(const LayersInput &s, int layer, int t) {
    return size_t(layer) * s.layer_stride + size_t(t / s.seqlen) * s.row_stride +
           size_t(s.positions[t]) * s.n_kv_heads * s.head_dim;
}

// Rotates a pair of neighbours.
inline void turn(const float *by, float *pair) {
    float real = pair[0] * by[0] - pair[1] * by[1], imaginary = pair[0] * by[1] + pair[1] * by[0];
    pair[0] = real, pair[1] = imaginary;
}

inline void norm(const float *x, const float *weight, int dim, float eps, float *y) {
    float scale = 1.0f / std::sqrt(dot(x, x, dim) / float(dim) + eps);
    int i = 0;
    for (; i + LANES <= dim; i += LANES) store(y + i, load<f32>(x + i) * scale * load<f32>(weight + i));
    for (; i < dim; i++) y[i] = x[i] * scale * weight[i];
}

inline f32 silu(f32 x) { return x / (1.0f + exponential(-x)); }

enum Halves { ATTENTION = 1, FEED_FORWARD = 2 };

static float *buffer(std::vector<float> &kept, size_t n) {
    if (kept.size() < n) kept.resize(n);
    return kept.data();
}

// A thread's own copy of an input with its sums.
struct Prepared {
    std::vector<float> values, sums;

    Input made(const float *from, int n, int columns) {
        float *to = buffer(sums, size_t(n) * (columns / 16) + 1);
        for (int t = 0; t < n; t++) sum_sixteens(from + size_t(t) * columns, columns, to + size_t(t) * (columns / 16));
        return {from, to, columns};
    }

    Input normed(const float *x, const float *weight, int n, int dim, float eps) {
        float *to = buffer(values, size_t(n) * dim);
        for (int t = 0; t < n; t++) norm(x + size_t(t) * dim, weight, dim, eps, to + size_t(t) * dim);
        return made(to, n, dim);
    }
};

struct Work {
    const LayersInput &s;
    Team &team;
    int rank;
    float *q, *parts, *hidden;  // shared by the threads
    int max_parts;
    Prepared &own;

    int first_key(int t) const { return int(std::max<int64_t>(0, s.positions[t] - s.window + 1)); }

    template <class Use> void tiles(const Weight &w, const Input &x, Use use) {
        float y[MAX_GEMV_TOKENS * TILE];
        Share share((w.rows + TILE - 1) / TILE, rank, team.size);
        for (int tile = share.start; tile < share.stop; tile++) {
            multiply(w, tile, x, s.n_tokens, y);
            use(tile * TILE, std::min(TILE, w.rows - tile * TILE), y);
        }
    }

    void attention(const Layer &w, int layer) {
        const int n = s.n_tokens, q_dim = s.n_heads * s.head_dim, group = s.n_heads / s.n_kv_heads;
        Input x = own.normed(s.x, w.attention_norm, n, s.dim, s.eps);
        auto rotated = [&](int t, int row, int rows, float *y) {
            for (int r = 0; r < rows; r += 2) turn(s.rotation + size_t(t) * s.head_dim + (row + r) % s.head_dim, y + r);
        };
        tiles(w.wq, x, [&](int row, int rows, float *y) {
            for (int t = 0; t < n; t++) {
                rotated(t, row, rows, y + t * TILE);
                memcpy(q + size_t(t) * q_dim + row, y + t * TILE, rows * 4);
            }
        });
        tiles(w.wk, x, [&](int row, int rows, float *y) {
            for (int t = 0; t < n; t++) {
                rotated(t, row, rows, y + t * TILE);
                write_floats(s.keys, s.cache_type, slot(s, layer, t) + row, rows, y + t * TILE);
            }
        });
        tiles(w.wv, x, [&](int row, int rows, float *y) {
            for (int t = 0; t < n; t++)
                write_floats(s.values, s.cache_type, slot(s, layer, t) + row, rows, y + t * TILE);
        });
        team.wait();

        const int width = s.head_dim + 2, size = value_bytes(s.cache_type);
        Share share(n * s.n_kv_heads * max_parts, rank, team.size);
        for (int unit = share.start; unit < share.stop; unit++) {
            int t = unit / (s.n_kv_heads * max_parts), head = unit / max_parts % s.n_kv_heads, part = unit % max_parts;
            int first = first_key(t), last = int(s.positions[t]) + 1;
            int start = std::max(first, (first / PART + part) * PART), stop = std::min(last, (first / PART + part + 1) * PART);
            if (start >= stop) continue;
            size_t at = (size_t(layer) * s.layer_stride + size_t(t / s.seqlen) * s.row_stride + head * s.head_dim) * size;
            attend_part(
                q + size_t(t) * q_dim + size_t(head) * group * s.head_dim, group, s.head_dim, s.keys + at,
                s.values + at, s.cache_type, size_t(s.n_kv_heads) * s.head_dim, start, stop,
                parts + ((size_t(part) * n + t) * s.n_heads + size_t(head) * group) * width
            );
        }
        team.wait();

        float *y = buffer(own.values, size_t(n) * q_dim);
        for (int t = 0; t < n; t++) {
            int n_parts = int(s.positions[t]) / PART - first_key(t) / PART + 1;
            for (int h = 0; h < s.n_heads; h++)
                join_parts(
                    parts + (size_t(t) * s.n_heads + h) * width, n_parts, size_t(n) * s.n_heads * width, s.head_dim,
                    y + size_t(t) * q_dim + h * s.head_dim
                );
        }
        add(w.wo, own.made(y, n, q_dim));
    }

    void feed_forward(const Layer &w) {
        const int n = s.n_tokens;
        Input x = own.normed(s.x, w.ffn_norm, n, s.dim, s.eps);
        float up[MAX_GEMV_TOKENS * TILE];
        tiles(w.w1, x, [&](int row, int rows, float *y) {
            multiply(w.w3, row / TILE, x, n, up);
            for (int t = 0; t < n; t++) {
                f32 made = silu(load<f32>(y + t * TILE)) * load<f32>(up + t * TILE);
                memcpy(hidden + size_t(t) * s.hidden_dim + row, &made, rows * 4);
            }
        });
        team.wait();
        add(w.w2, own.made(hidden, n, s.hidden_dim));
    }

    void add(const Weight &w, const Input &x) {
        tiles(w, x, [&](int row, int rows, float *y) {
            for (int t = 0; t < s.n_tokens; t++) {
                float *to = s.out + size_t(t) * s.dim + row;
                for (int r = 0; r < rows; r++) to[r] = (s.out == s.x ? to[r] : 0.0f) + y[t * TILE + r];
            }
        });
        team.wait();
    }
};
