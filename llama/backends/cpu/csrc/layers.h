// Transformer layers for a few tokens in one call: norms, products, rotation, cache, attention and feed-forward.
#pragma once
#include "attention.h"
#include "threads.h"

constexpr int MAX_FEW_TOKENS = 64;  // as in ops.py

struct Layer {
    Weight wq, wk, wv, wo, w1, w2, w3;
    const float *attention_norm, *ffn_norm;
};

struct LayersInput {
    int32_t n_tokens, n_rows, pages_per_row, n_pages;
    int32_t dim, n_heads, n_kv_heads, head_dim, hidden_dim, cache_type;
    int64_t window;  // number of keys that a query sees
    const int64_t *positions;  // (n_tokens)
    const int32_t *rows;  // (n_tokens): the row of each token
    const int32_t *page_table;  // (n_rows, pages_per_row): the pages of each row
    const float *rotation;  // (n_tokens, head_dim / 2) complex numbers
    uint8_t *keys, *values;  // (layers, n_pages, PAGE_SIZE, n_kv_heads, head_dim)
    float *x;  // (n_tokens, dim): the residual
    float *out;  // x itself, which results are added to, or where this rank's part of a half's result is written
    float eps;
    int32_t threads;
};

// The pages of token t's row.
inline const int32_t *pages_of(const LayersInput &in, int t) {
    return in.page_table + size_t(in.rows[t]) * in.pages_per_row;
}

// The index in the cache at which the keys and values of a layer's slot begin, in numbers.
inline size_t index_of(const LayersInput &in, int layer, size_t slot) {
    return (size_t(layer) * in.n_pages * PAGE_SIZE + slot) * in.n_kv_heads * in.head_dim;
}

// The same of token t.
inline size_t index_of_token(const LayersInput &in, int layer, int t) {
    return index_of(in, layer, slot(pages_of(in, t), in.positions[t]));
}

// The keys that token t sees, [first, stop), in parts: each ends at a multiple of PART, or at the last key.
struct Keys {
    int first, stop;
    Keys(const LayersInput &in, int t)
        : first(int(std::max<int64_t>(0, in.positions[t] - in.window + 1))), stop(int(in.positions[t]) + 1) {}
    int parts() const { return (stop - 1) / PART - first / PART + 1; }
    int part_start(int part) const { return std::max(first, (first / PART + part) * PART); }
    int part_stop(int part) const { return std::min(stop, (first / PART + part + 1) * PART); }
};

// Attention of token t's query heads of one KV head, q (group, head_dim), over a part of its keys: see attend_part.
inline void attend_token(
    const LayersInput &in, int layer, int t, int head, const Keys &keys, int part, const float *q, float *out
) {
    const size_t at = (index_of(in, layer, 0) + size_t(head) * in.head_dim) * value_bytes(in.cache_type);
    attend_part(
        q, in.n_heads / in.n_kv_heads, in.head_dim, in.keys + at, in.values + at, in.cache_type,
        size_t(in.n_kv_heads) * in.head_dim, pages_of(in, t), keys.part_start(part), keys.part_stop(part), out
    );
}

// Multiplies an adjacent pair, as a complex number, by the complex number of its rotation.
inline void rotate_pair(const float *rotation, float *pair) {
    float real = pair[0] * rotation[0] - pair[1] * rotation[1];
    float imaginary = pair[0] * rotation[1] + pair[1] * rotation[0];
    pair[0] = real, pair[1] = imaginary;
}

inline void rms_norm(const float *x, const float *weight, int dim, float eps, float *y) {
    float scale = 1.0f / std::sqrt(dot(x, x, dim) / float(dim) + eps);
    int i = 0;
    for (; i + LANES <= dim; i += LANES) store(y + i, load<f32>(x + i) * scale * load<f32>(weight + i));
    for (; i < dim; i++) y[i] = x[i] * scale * weight[i];
}

inline f32 silu(f32 x) { return x / (1.0f + exponential(-x)); }

enum Halves { ATTENTION = 1, FEED_FORWARD = 2 };

// Grows a buffer to at least n values, the first of which begins a cache line.
template <class T> T *buffer(std::vector<T> &storage, size_t n) {
    constexpr size_t LINE = 64;
    if (storage.size() < n + LINE / sizeof(T)) storage.resize(n + LINE / sizeof(T));
    return (T *)((uintptr_t(storage.data()) + LINE - 1) / LINE * LINE);
}

// A thread's own memory for the activations that it multiplies.
struct Activations {
    std::vector<float> values;
    std::vector<uint8_t> rounded;

    // Activations for these weights.
    template <class... Weights> Input input(const float *from, int n, int columns, const Weights &...weights) {
        if (!(weights.is_packed() || ...)) return {from, nullptr, columns, n};
        uint8_t *to = buffer(rounded, n * rounded_bytes(columns));
        round_activations(from, columns, 0, n, to);
        return {from, to, columns, n};
    }

    template <class... Weights>
    Input normalised(const float *x, const float *norm, int n, int dim, float eps, const Weights &...weights) {
        float *to = buffer(values, size_t(n) * dim);
        for (int t = 0; t < n; t++) rms_norm(x + size_t(t) * dim, norm, dim, eps, to + size_t(t) * dim);
        return input(to, n, dim, weights...);
    }
};

// One thread's share of a call.
struct Worker {
    const LayersInput &in;
    Team &team;
    int thread, size;
    float *q, *parts, *hidden;  // shared by the threads
    const int *first_part;  // (n_tokens + 1): the parts of the tokens before each
    Activations &own;

    // Multiplies this thread's tiles of a weight by all tokens: use(first row, number of rows, products of the tile).
    template <class Use> void tiles(const Weight &w, const Input &x, Use use) {
        float y[MAX_FEW_TOKENS * TILE];
        Share share((w.rows + TILE - 1) / TILE, thread, size);
        for (int tile = share.start; tile < share.stop; tile++) {
            gemv_tile(w, tile, x, y);
            use(tile * TILE, std::min(TILE, w.rows - tile * TILE), y);
        }
    }

    void attention(const Layer &w, int layer) {
        const int n = in.n_tokens, q_dim = in.n_heads * in.head_dim, group = in.n_heads / in.n_kv_heads;
        Input x = own.normalised(in.x, w.attention_norm, n, in.dim, in.eps, w.wq, w.wk, w.wv);
        auto rotate = [&](int t, int row, int rows, float *y) {
            const float *rotation = in.rotation + size_t(t) * in.head_dim;
            for (int r = 0; r < rows; r += 2) rotate_pair(rotation + (row + r) % in.head_dim, y + r);
        };
        tiles(w.wq, x, [&](int row, int rows, float *y) {
            for (int t = 0; t < n; t++) {
                rotate(t, row, rows, y + t * TILE);
                memcpy(q + size_t(t) * q_dim + row, y + t * TILE, rows * 4);
            }
        });
        tiles(w.wk, x, [&](int row, int rows, float *y) {
            for (int t = 0; t < n; t++) {
                rotate(t, row, rows, y + t * TILE);
                write_floats(in.keys, in.cache_type, index_of_token(in, layer, t) + row, rows, y + t * TILE);
            }
        });
        tiles(w.wv, x, [&](int row, int rows, float *y) {
            for (int t = 0; t < n; t++)
                write_floats(in.values, in.cache_type, index_of_token(in, layer, t) + row, rows, y + t * TILE);
        });
        team.wait(size);

        const int width = in.head_dim + 2;
        Share share(first_part[n] * in.n_kv_heads, thread, size);
        for (int unit = share.start, t = 0; unit < share.stop; unit++) {
            while (unit >= first_part[t + 1] * in.n_kv_heads) t++;
            int head = unit % in.n_kv_heads, part = unit / in.n_kv_heads;
            attend_token(
                in, layer, t, head, Keys(in, t), part - first_part[t],
                q + size_t(t) * q_dim + size_t(head) * group * in.head_dim,
                parts + (size_t(part) * in.n_heads + head * group) * width
            );
        }
        team.wait(size);

        float *y = buffer(own.values, size_t(n) * q_dim);
        for (int t = 0; t < n; t++)
            for (int h = 0; h < in.n_heads; h++)
                merge_parts(
                    parts + (size_t(first_part[t]) * in.n_heads + h) * width, first_part[t + 1] - first_part[t],
                    size_t(in.n_heads) * width, in.head_dim, y + size_t(t) * q_dim + h * in.head_dim
                );
        add(w.wo, own.input(y, n, q_dim, w.wo));
    }

    void feed_forward(const Layer &w) {
        const int n = in.n_tokens;
        Input x = own.normalised(in.x, w.ffn_norm, n, in.dim, in.eps, w.w1, w.w3);
        float up[MAX_FEW_TOKENS * TILE];
        tiles(w.w1, x, [&](int row, int rows, float *y) {
            gemv_tile(w.w3, row / TILE, x, up);
            for (int t = 0; t < n; t++) {
                f32 gated = silu(load<f32>(y + t * TILE)) * load<f32>(up + t * TILE);
                memcpy(hidden + size_t(t) * in.hidden_dim + row, &gated, rows * 4);
            }
        });
        team.wait(size);
        add(w.w2, own.input(hidden, n, in.hidden_dim, w.w2));
    }

    // Multiplies x, and adds the products to the residual, or writes them to this rank's part.
    void add(const Weight &w, const Input &x) {
        tiles(w, x, [&](int row, int rows, float *y) {
            for (int t = 0; t < in.n_tokens; t++) {
                float *to = in.out + size_t(t) * in.dim + row;
                for (int r = 0; r < rows; r++) to[r] = (in.out == in.x ? to[r] : 0.0f) + y[t * TILE + r];
            }
        });
        team.wait(size);
    }
};
