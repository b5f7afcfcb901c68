// Transformer layers for a few tokens in one call: norms, products, rotation, cache, attention and feed-forward.
#pragma once
#include "activations.h"
#include "attention.h"
#include "threads.h"
#include "weights.h"

struct Layer {
    Weight wq, wk, wv, wo, w1, w2, w3;  // w1 has no rows where the activation has no gate
    const float *attention_norm, *ffn_norm;
    Activation activation;
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

// Tokens of one row at successive positions, which are attended together.
struct TokenBlock {
    int first, n;
};

// Cuts the tokens of a step to blocks with at most `queries` query heads of a KV head, or of one token.
inline std::vector<TokenBlock> token_blocks(const LayersInput &in, int queries) {
    const int most = std::max(1, queries / (in.n_heads / in.n_kv_heads));
    std::vector<TokenBlock> blocks;
    for (int t = 0; t < in.n_tokens; t++) {
        const bool follows = t > 0 && in.rows[t] == in.rows[t - 1] && in.positions[t] == in.positions[t - 1] + 1;
        if (follows && blocks.back().n < most) blocks.back().n++;
        else blocks.push_back({t, 1});
    }
    return blocks;
}

// What KV heads [head, head + heads) of a block's row have in a layer's cache.
inline CachedHeads cached_heads(const LayersInput &in, int layer, const TokenBlock &block, int head, int heads) {
    const int bytes = value_bytes(in.cache_type);
    const size_t at = (index_of(in, layer, 0) + size_t(head) * in.head_dim) * bytes;
    const size_t stride = size_t(in.n_kv_heads) * in.head_dim * bytes;
    return {in.keys + at, in.values + at, in.cache_type, in.head_dim, heads, stride, pages_of(in, block.first)};
}

// A block's queries of these heads, as Op multiplies them; those of all tokens are q (n_tokens, n_heads, head_dim).
template <class Op>
Queries block_queries(
    const LayersInput &in, const TokenBlock &block, int head, int heads, const void *q, int type, Lines &memory
) {
    const int group = in.n_heads / in.n_kv_heads, values = group * in.head_dim, words = in.head_dim / Op::PER_WORD;
    float *to = memory.room(size_t(heads) * block.n * group * words);
    for (int h = 0; h < heads; h++)
        for (int t = 0; t < block.n; t++) {
            const size_t at = (size_t(block.first + t) * in.n_kv_heads + head + h) * values;
            float *rows = to + (size_t(h) * block.n + t) * group * words;
            if (Op::PER_WORD == 1) read_floats(q, type, at, values, rows);
            else memcpy(rows, (const uint16_t *)q + at, values * 2);
        }
    return {to, group, block.n, words, in.positions[block.first], in.window};
}

// The attention of a step of few tokens: of each block its parts, and of each part some KV heads, are a unit of work.
struct AttentionPlan {
    static constexpr int QUERIES = 12;  // of a block: two tiles, so that there are enough blocks for all threads
    std::vector<TokenBlock> blocks;
    std::vector<int> parts;  // before each block, and in all
    std::vector<size_t> results;  // the same
    int heads;  // of a unit: all where there are parts enough for all threads, as memory is read best in its order

    explicit AttentionPlan(const LayersInput &in)
        : blocks(token_blocks(in, QUERIES)), parts{0}, results{0} {
        for (const TokenBlock &block : blocks) {
            const int64_t first = std::max<int64_t>(0, in.positions[block.first] - in.window + 1);
            const int n = int((in.positions[block.first] + block.n - 1) / PART - first / PART) + 1;
            parts.push_back(parts.back() + n);
            results.push_back(results.back() + size_t(n) * block.n * in.n_heads);
        }
        heads = parts.back() >= 4 * in.threads ? in.n_kv_heads : 1;
    }
};

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

inline void rms_norm(const float *x, const float *weight, int dim, float eps, float *y) {
    float scale = 1.0f / std::sqrt(dot(x, x, dim) / float(dim) + eps);
    int i = 0;
    for (; i + LANES <= dim; i += LANES) store(y + i, load<f32>(x + i) * scale * load<f32>(weight + i));
    for (; i < dim; i++) y[i] = x[i] * scale * weight[i];
}

enum Halves { ATTENTION = 1, FEED_FORWARD = 2 };

// Grows a buffer to at least n values, the first of which begins a cache line.
template <class T> T *buffer(std::vector<T> &storage, size_t n) {
    constexpr size_t LINE = 64;
    if (storage.size() < n + LINE / sizeof(T)) storage.resize(n + LINE / sizeof(T));
    return (T *)((uintptr_t(storage.data()) + LINE - 1) / LINE * LINE);
}

// A thread's own memory for the activations that it multiplies, and for attention.
struct Activations {
    std::vector<float> values;
    std::vector<uint8_t> rounded;
    std::vector<float> low[2];
    Lines queries;
    PartMemory part;

    // Activations for these weights.
    template <class... Weights> Input input(const float *from, int n, int columns, const Weights &...weights) {
        if (!(weights.is_packed() || ...)) return {from, nullptr, columns, n};
        uint8_t *to = buffer(rounded, n * rounded_bytes(columns));
        round_activations(from, columns, 0, n, to);
        return {from, to, columns, n};
    }

    // What a weight's adapters make of all tokens at first, (n, rank), or null where it has none; number: of two such
    // weights that are multiplied at once. Each thread makes all of it, so that none waits.
    const float *low_rank(const Weight &w, const Input &x, int number = 0) {
        if (!w.low_rank) return nullptr;
        float *to = buffer(low[number], size_t(x.n) * w.low_rank->a.rows);
        low_rank_input(*w.low_rank, x, to);
        return to;
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
    float *q, *results, *hidden;  // shared by the threads
    const AttentionPlan &plan;
    Activations &own;

    // Multiplies this thread's tiles of a weight by all tokens: use(first row, number of rows, products of the tile).
    template <class Use> void tiles(const Weight &w, const Input &x, Use use) {
        float y[MAX_FEW_TOKENS * TILE];
        const float *low = own.low_rank(w, x);
        Share share((w.rows + TILE - 1) / TILE, thread, size);
        for (int tile = share.start; tile < share.stop; tile++) {
            gemv_tile(w, tile, x, y, low);
            use(tile * TILE, std::min(TILE, w.rows - tile * TILE), y);
        }
    }

    // The keys of a unit of attention, of block b or the one after it.
    Following following(int layer, int unit, int units, int b) {
        const int part = unit / units;
        b += part >= plan.parts[b + 1];
        const TokenBlock &block = plan.blocks[b];
        const int64_t first = std::max<int64_t>(0, in.positions[block.first] - in.window + 1);
        const int64_t start = std::max(first / PAGE_SIZE * PAGE_SIZE, (first / PART + part - plan.parts[b]) * PART);
        return {
            cached_heads(in, layer, block, unit % units * plan.heads, plan.heads), int(start),
            int(in.positions[block.first]) + block.n
        };
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

        const size_t length = result_size(in.head_dim);
        const int units = in.n_kv_heads / plan.heads;  // of a part
        Share share(plan.parts.back() * units, thread, size);
        for (int unit = share.start, b = 0; unit < share.stop; unit++) {
            const int part = unit / units, head = unit % units * plan.heads;
            while (part >= plan.parts[b + 1]) b++;
            const TokenBlock &block = plan.blocks[b];
            const Queries queries = block_queries<Fp32>(in, block, head, plan.heads, q, F32, own.queries);
            const size_t before = (size_t(part - plan.parts[b]) * in.n_kv_heads + head) * queries.rows();
            attend_part<Fp32>(
                cached_heads(in, layer, block, head, plan.heads), queries, queries.first_part() + part - plan.parts[b],
                following(layer, unit + 1 < share.stop ? unit + 1 : unit, units, b), own.part,
                results + (plan.results[b] + before) * length
            );
        }
        team.wait(size);

        float *y = buffer(own.values, size_t(n) * q_dim), *state = own.queries.room(length);
        for (size_t b = 0; b < plan.blocks.size(); b++) {
            const TokenBlock &block = plan.blocks[b];
            for (int h = 0; h < in.n_heads; h++)
                for (int t = 0; t < block.n; t++) {
                    const int row = (h / group * block.n + t) * group + h % group;
                    clear_result(state, in.head_dim);
                    for (int part = 0; part < plan.parts[b + 1] - plan.parts[b]; part++) {
                        const size_t before = size_t(part) * block.n * in.n_heads + row;
                        merge(state, results + (plan.results[b] + before) * length, in.head_dim);
                    }
                    finish(state, in.head_dim, y + size_t(block.first + t) * q_dim + h * in.head_dim);
                }
        }
        add(w.wo, own.input(y, n, q_dim, w.wo));
    }

    void feed_forward(const Layer &w) {
        const int n = in.n_tokens;
        Input x = own.normalised(in.x, w.ffn_norm, n, in.dim, in.eps, w.w1, w.w3);
        float up[MAX_FEW_TOKENS * TILE];
        if (w.activation.kind == SILU) {
            const float *low = own.low_rank(w.w3, x, 1);
            tiles(w.w1, x, [&](int row, int rows, float *y) {
                gemv_tile(w.w3, row / TILE, x, up, low);
                for (int t = 0; t < n; t++) {
                    f32 gated = silu(load<f32>(y + t * TILE)) * load<f32>(up + t * TILE);
                    memcpy(hidden + size_t(t) * in.hidden_dim + row, &gated, rows * 4);
                }
            });
        } else {
            tiles(w.w3, x, [&](int row, int rows, float *y) {
                for (int t = 0; t < n; t++) {
                    activate(w.activation, y + t * TILE);
                    memcpy(hidden + size_t(t) * in.hidden_dim + row, y + t * TILE, rows * 4);
                }
            });
        }
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
