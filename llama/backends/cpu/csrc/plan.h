// What layers are, what a step gives them, and how its attention is cut to units of work.
#pragma once
#include "activations.h"
#include "attention.h"
#include "experts.h"
#include "weights.h"

struct Layer {
    Weight wq, wk, wv, wo, w1, w2, w3;  // w1 has no rows where the activation has no gate
    Norm attention_norm, ffn_norm;  // of what these are given
    Norm attention_output_norm, ffn_output_norm;  // of what these add, over all ranks
    const float *q_norm, *k_norm;  // by which heads are multiplied that are normalised: see HeadNorm
    Sight sight;
    int32_t head_norm;
    int32_t q_rotation, k_rotation;  // which of the rotations turns queries, and which keys
    Activation activation;
    const Experts *experts;  // or null; beside them w1, w2 and w3 are the shared expert's, or have no rows
};

// The sum of the ranks of adapters beside a layer's weights.
inline int ranks_of(const Layer &w) {
    int sum = 0;
    for (const Weight *each : {&w.wq, &w.wk, &w.wv, &w.wo, &w.w1, &w.w2, &w.w3})
        sum += each->low_rank ? each->low_rank->a.rows : 0;
    return sum;
}

struct LayersInput {
    int32_t n_tokens, n_rows, pages_per_row, n_pages;
    int32_t dim, n_heads, n_kv_heads, head_dim, hidden_dim, cache_type;  // hidden_dim: the most features of a token
    const int64_t *positions;  // (n_tokens)
    const int32_t *rows;  // (n_tokens): the row of each token
    const int32_t *page_table;  // (n_rows, pages_per_row): the pages of each row
    const float *rotations;  // (rotations, n_tokens, head_dim / 2) complex numbers
    uint8_t *keys, *values;  // (layers, n_pages, PAGE_SIZE, n_kv_heads, head_dim)
    float *x;  // (n_tokens, dim): the residual
    float *q, *k;  // (n_tokens, heads, head_dim): where these are between two calls, or null
    float *out;  // x itself, which results are added to, or where this rank's part of a half's result is written
    float eps;
    int32_t threads;
};

// Rotation number `rotation` of token t.
inline const float *rotation_of(const LayersInput &in, int rotation, int t) {
    return in.rotations + (size_t(rotation) * in.n_tokens + t) * in.head_dim;
}

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
    const LayersInput &in, const Sight &sight, const TokenBlock &block, int head, int heads, const void *q, int type,
    Lines &memory
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
    return {to, group, block.n, words, in.positions[block.first], sight};
}

// The attention of a step of few tokens by layers of one sight: of each block its parts, and of each part some KV heads, are a unit of work.
struct AttentionPlan {
    Sight sight;
    static constexpr int QUERIES = 12;  // of a block: two tiles, so that there are enough blocks for all threads
    std::vector<TokenBlock> blocks;
    std::vector<int> parts;  // before each block, and in all
    std::vector<size_t> results;  // the same
    int heads;  // of a unit: all where there are parts enough for all threads, as memory is read best in its order

    AttentionPlan(const LayersInput &in, const Sight &sight)
        : sight(sight), blocks(token_blocks(in, QUERIES)), parts{0}, results{0} {
        for (const TokenBlock &block : blocks) {
            const int first = sight.first_key(in.positions[block.first]);
            const int n = int((in.positions[block.first] + block.n - 1) / PART) - first / PART + 1;
            parts.push_back(parts.back() + n);
            results.push_back(results.back() + size_t(n) * block.n * in.n_heads);
        }
        heads = parts.back() >= 4 * in.threads ? in.n_kv_heads : 1;
    }
};
