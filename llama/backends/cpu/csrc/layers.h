// Transformer layers for a few tokens in one call: norms, products, rotation, cache, attention and feed-forward.
#pragma once
#include "feed_forward.h"

// Queries, keys and values; what attention makes of them; and the rest of a layer.
enum Parts { PROJECTION = 1, ATTENTION = 2, FEED_FORWARD = 4 };

struct AttentionHalf : Worker {
    // The keys of a unit of attention, of block b or the one after it.
    Following following(const AttentionPlan &plan, int layer, int unit, int units, int b) {
        const int part = unit / units;
        b += part >= plan.parts[b + 1];
        const TokenBlock &block = plan.blocks[b];
        const int first = plan.sight.first_key(in.positions[block.first]);
        const int start = std::max(first / PAGE_SIZE * PAGE_SIZE, (first / PART + part - plan.parts[b]) * PART);
        return {
            cached_heads(in, layer, block, unit % units * plan.heads, plan.heads), start,
            int(in.positions[block.first]) + block.n
        };
    }

    // Caches keys and values of all tokens, and leaves their queries in q. Heads that are normalised are left as they are,
    // in q and k: a tile is not a whole head.
    void project(const Layer &w, int layer) {
        const int n = in.n_tokens, q_dim = in.n_heads * in.head_dim, kv_dim = in.n_kv_heads * in.head_dim;
        const bool whole = w.head_norm != NO_HEAD;
        Input x = own.normalised(in.x, w.attention_norm, n, in.dim, in.eps, w.wq, w.wk, w.wv);
        auto rotate = [&](int rotation, int t, int row, int rows, float *y) {
            const float *from = rotation_of(in, rotation, t);
            for (int r = 0; r < rows; r += 2) rotate_pair(from + (row + r) % in.head_dim, y + r);
        };
        const auto low = low_ranks(x, w.wq, w.wk, w.wv);
        tiles(w.wq, x, low[0], [&](int row, int rows, float *y) {
            for (int t = 0; t < n; t++, y += TILE) {
                if (!whole) rotate(w.q_rotation, t, row, rows, y);
                memcpy(q + size_t(t) * q_dim + row, y, rows * 4);
            }
        });
        tiles(w.wk, x, low[1], [&](int row, int rows, float *y) {
            for (int t = 0; t < n; t++, y += TILE) {
                if (whole) {
                    memcpy(k + size_t(t) * kv_dim + row, y, rows * 4);
                } else {
                    rotate(w.k_rotation, t, row, rows, y);
                    write_floats(in.keys, in.cache_type, index_of_token(in, layer, t) + row, rows, y);
                }
            }
        });
        tiles(w.wv, x, low[2], [&](int row, int rows, float *y) {
            for (int t = 0; t < n; t++)
                write_floats(in.values, in.cache_type, index_of_token(in, layer, t) + row, rows, y + t * TILE);
        });
        team.wait(size);
    }

    // Normalises and rotates what `project` left, and caches the keys.
    void turn(const Layer &w, int layer) {
        const int together = w.head_norm == ALL_HEADS, dim = in.head_dim;
        const int heads = together ? in.n_heads : 1, kv_heads = together ? in.n_kv_heads : 1;  // of a unit of work
        const int q_units = in.n_heads / heads, units = q_units + in.n_kv_heads / kv_heads;
        Share share(in.n_tokens * units, thread, size);
        for (int unit = share.start; unit < share.stop; unit++) {
            const int t = unit / units, of_q = unit % units, of_k = of_q - q_units;
            if (of_k < 0) {
                float *x = q + (size_t(t) * in.n_heads + of_q * heads) * dim;
                turn_heads(x, heads, dim, w.head_norm, w.q_norm, rotation_of(in, w.q_rotation, t), in.eps);
            } else {
                float *x = k + (size_t(t) * in.n_kv_heads + of_k * kv_heads) * dim;
                turn_heads(x, kv_heads, dim, w.head_norm, w.k_norm, rotation_of(in, w.k_rotation, t), in.eps);
                const size_t at = index_of_token(in, layer, t) + of_k * kv_heads * dim;
                write_floats(in.keys, in.cache_type, at, kv_heads * dim, x);
            }
        }
        team.wait(size);
    }

    void run(const Layer &w, int layer, const AttentionPlan &plan) {
        if (w.head_norm != NO_HEAD) turn(w, layer);
        const int n = in.n_tokens, q_dim = in.n_heads * in.head_dim, group = in.n_heads / in.n_kv_heads;
        const size_t length = result_size(in.head_dim);
        const int units = in.n_kv_heads / plan.heads;  // of a part
        Share share(plan.parts.back() * units, thread, size);
        for (int unit = share.start, b = 0; unit < share.stop; unit++) {
            const int part = unit / units, head = unit % units * plan.heads;
            while (part >= plan.parts[b + 1]) b++;
            const TokenBlock &block = plan.blocks[b];
            const Queries queries = block_queries<Fp32>(in, plan.sight, block, head, plan.heads, q, F32, own.queries);
            const size_t before = (size_t(part - plan.parts[b]) * in.n_kv_heads + head) * queries.rows();
            attend_part<Fp32>(
                cached_heads(in, layer, block, head, plan.heads), queries, queries.first_part() + part - plan.parts[b],
                following(plan, layer, unit + 1 < share.stop ? unit + 1 : unit, units, b), own.part,
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
        products(w.wo, own.input(y, n, q_dim, w.wo), target(w.attention_output_norm));
        finish_half(w.attention_output_norm);
    }
};
