// Transformer layers for a few tokens in one call: norms, products, rotation, cache, attention and feed-forward.
#pragma once
#include <array>

#include "plan.h"
#include "threads.h"

// Queries, keys and values; what attention makes of them; and the rest of a layer.
enum Parts { PROJECTION = 1, ATTENTION = 2, FEED_FORWARD = 4 };

// Grows a buffer to at least n values, the first of which begins a cache line.
template <class T> T *buffer(std::vector<T> &storage, size_t n) {
    constexpr size_t LINE = 64;
    if (storage.size() < n + LINE / sizeof(T)) storage.resize(n + LINE / sizeof(T));
    return (T *)((uintptr_t(storage.data()) + LINE - 1) / LINE * LINE);
}

// A thread's own memory for the activations that it multiplies, and for attention.
struct Activations {
    std::vector<float> values, gathered;
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

    // What adapters of an expert's weight make of its tokens at first, (n, rank), or null where it has none; number: of
    // two such weights that are multiplied at once. Each thread makes all of it: it may have tiles of other experts.
    const float *low_rank(const Weight &w, const Input &x, int number = 0) {
        if (!w.low_rank) return nullptr;
        float *to = buffer(low[number], size_t(x.n) * w.low_rank->a.rows);
        low_rank_input(*w.low_rank, x, to);
        return to;
    }

    template <class... Weights>
    Input normalised(const float *x, const Norm &norm, int n, int dim, float eps, const Weights &...weights) {
        if (!norm.weight) return input(x, n, dim, weights...);
        float *to = buffer(values, size_t(n) * dim);
        for (int t = 0; t < n; t++) normalise(x + size_t(t) * dim, norm, dim, eps, to + size_t(t) * dim);
        return input(to, n, dim, weights...);
    }
};

// One thread's share of a call.
struct Worker {
    const LayersInput &in;
    Team &team;
    int thread, size;
    float *q, *k, *results, *hidden, *added, *scores, *low;  // shared by the threads
    Activations &own;

    // What adapters of some weights of one input make of all tokens at first, (n, rank) each, or null: threads share the
    // rows, and wait for each other where there are any.
    template <class... Weights>
    std::array<const float *, sizeof...(Weights)> low_ranks(const Input &x, const Weights &...weights) {
        std::array<const float *, sizeof...(Weights)> found{};
        const LowRank *adapters[] = {weights.low_rank...};
        float *to = low;
        int units = 0;
        for (const LowRank *each : adapters) units += each ? (each->a.rows + ROWS - 1) / ROWS : 0;
        const Share share(units, thread, size);
        int unit = 0;
        for (size_t i = 0; i < found.size(); i++) {
            if (!adapters[i]) continue;
            for (int row = 0; row < adapters[i]->a.rows; row += ROWS, unit++)
                if (unit >= share.start && unit < share.stop) low_rank_rows(*adapters[i], row, x, to);
            found[i] = to;
            to += size_t(x.n) * adapters[i]->a.rows;
        }
        if (units) team.wait(size);
        return found;
    }

    // Multiplies this thread's tiles of a weight by all tokens: use(first row, number of rows, products of the tile).
    template <class Use> void tiles(const Weight &w, const Input &x, const float *low, Use use) {
        float y[MAX_FEW_TOKENS * TILE];
        Share share((w.rows + TILE - 1) / TILE, thread, size);
        for (int tile = share.start; tile < share.stop; tile++) {
            gemv_tile(w, tile, x, y, low);
            use(tile * TILE, std::min(TILE, w.rows - tile * TILE), y);
        }
    }

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

    void attention(const Layer &w, int layer, const AttentionPlan &plan) {
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

    void feed_forward(const Layer &w) {
        const int n = in.n_tokens, features = w.w3.rows;  // of the shared expert, where there are experts
        Input x = own.normalised(in.x, w.ffn_norm, n, in.dim, in.eps, w.w1, w.w3);
        float *out = target(w.ffn_output_norm);
        if (w.activation.kind == SILU) gate(w.w1, w.w3, x, hidden);
        else
            tiles(w.w3, x, low_ranks(x, w.w3)[0], [&](int row, int rows, float *y) {
                for (int t = 0; t < n; t++) {
                    activate(w.activation, y + t * TILE);
                    memcpy(hidden + size_t(t) * features + row, y + t * TILE, rows * 4);
                }
            });
        if (w.experts) {
            const Experts &e = *w.experts;
            float *routed = hidden + size_t(n) * features;
            tiles(e.gate, x, nullptr, [&](int row, int rows, float *y) {
                for (int t = 0; t < n; t++) memcpy(scores + size_t(t) * e.n + row, y + t * TILE, rows * 4);
            });
            team.wait(size);
            const Routes routes(e, scores, n);
            gate(e, routes, x.values, routed);
            team.wait(size);
            if (features) products(w.w2, own.input(hidden, n, features, w.w2), out);
            products(e, routes, routed, out, features == 0 && out != in.x);
        } else {
            team.wait(size);
            products(w.w2, own.input(hidden, n, features, w.w2), out);
        }
        finish_half(w.ffn_output_norm);
    }

    // Writes silu(w1 x) * w3 x of all tokens: (n, rows).
    void gate(const Weight &w1, const Weight &w3, const Input &x, float *to) {
        float up[MAX_FEW_TOKENS * TILE];
        const auto low = low_ranks(x, w1, w3);
        tiles(w1, x, low[0], [&](int row, int rows, float *y) {
            gemv_tile(w3, row / TILE, x, up, low[1]);
            write_gated(y, up, x.n, row, rows, w1.rows, to);
        });
    }

    // The same of each expert and its tokens, in the order of routes. Threads share the tiles of all that are used.
    void gate(const Experts &e, const Routes &routes, const float *x, float *to) {
        float y[MAX_FEW_TOKENS * TILE], up[MAX_FEW_TOKENS * TILE];
        const int rows = e.experts->w1.rows, tiles = (rows + TILE - 1) / TILE;
        Share share(int(routes.uses.size()) * tiles, thread, size);
        for (int unit = share.start; unit < share.stop;) {
            const Routes::Use &use = routes.uses[unit / tiles];
            const Expert &w = e.experts[use.expert];
            float *values = buffer(own.gathered, size_t(use.n) * in.dim);
            for (int t = 0; t < use.n; t++) {
                const float *from = x + size_t(routes.tokens[use.first + t]) * in.dim;
                const float factor = e.router == SIGMOID_OF_INPUT ? routes.factors[use.first + t] : 1.0f;
                for (int i = 0; i < in.dim; i++) values[size_t(t) * in.dim + i] = from[i] * factor;
            }
            const Input part = own.input(values, use.n, in.dim, w.w1, w.w3);
            const float *low = own.low_rank(w.w1, part), *low_up = own.low_rank(w.w3, part, 1);
            for (const int stop = std::min(share.stop, (unit / tiles + 1) * tiles); unit < stop; unit++) {
                const int tile = unit % tiles, row = tile * TILE;
                gemv_tile(w.w1, tile, part, y, low);
                gemv_tile(w.w3, tile, part, up, low_up);
                write_gated(y, up, use.n, row, std::min(TILE, rows - row), rows, to + size_t(use.first) * rows);
            }
        }
    }

    // Writes silu(y) * up, a tile of n tokens, to (n, stride).
    static void write_gated(const float *y, const float *up, int n, int row, int rows, int stride, float *to) {
        for (int t = 0; t < n; t++) {
            f32 gated = silu(load<f32>(y + t * TILE)) * load<f32>(up + t * TILE);
            memcpy(to + size_t(t) * stride + row, &gated, rows * 4);
        }
    }

    // Where the products of a half are: added to the residual, or by themselves, to be normalised or as a rank's part.
    float *target(const Norm &norm) const { return in.out == in.x && norm.weight ? added : in.out; }

    // Multiplies x, and writes the products, or adds them to the residual.
    void products(const Weight &w, const Input &x, float *out) {
        tiles(w, x, low_ranks(x, w)[0], [&](int row, int rows, float *y) {
            for (int t = 0; t < in.n_tokens; t++) {
                float *to = out + size_t(t) * in.dim + row;
                for (int r = 0; r < rows; r++) to[r] = (out == in.x ? to[r] : 0.0f) + y[t * TILE + r];
            }
        });
    }

    // Adds what experts make of their tokens' features, in the order of the experts' numbers, whatever tokens are
    // beside; is_first: to zeros. A thread has the rows that it has of a shared expert's products.
    void products(const Experts &e, const Routes &routes, const float *features, float *out, bool is_first) {
        float y[MAX_FEW_TOKENS * TILE];
        Share share((in.dim + TILE - 1) / TILE, thread, size);
        const int start = share.start * TILE, wide = std::min(in.dim, share.stop * TILE) - start;
        if (is_first && wide > 0)
            for (int t = 0; t < in.n_tokens; t++) memset(out + size_t(t) * in.dim + start, 0, size_t(wide) * 4);
        for (const Routes::Use &use : routes.uses) {
            const Weight &w = e.experts[use.expert].w2;
            const Input part = own.input(features + size_t(use.first) * w.columns, use.n, w.columns, w);
            const float *low = own.low_rank(w, part);
            for (int tile = share.start; tile < share.stop; tile++) {
                gemv_tile(w, tile, part, y, low);
                const int row = tile * TILE, rows = std::min(TILE, in.dim - row);
                for (int t = 0; t < use.n; t++) {
                    float *to = out + size_t(routes.tokens[use.first + t]) * in.dim + row;
                    const float factor = e.router == SIGMOID_OF_INPUT ? 1.0f : routes.factors[use.first + t];
                    for (int r = 0; r < rows; r++) to[r] += factor * y[t * TILE + r];
                }
            }
        }
    }

    // Waits for all products of a half, and adds them to the residual where they are normalised first.
    void finish_half(const Norm &norm) {
        team.wait(size);
        float *out = target(norm);
        if (out != added) return;
        Share share(in.n_tokens, thread, size);
        for (int t = share.start; t < share.stop; t++) {
            normalise(out + size_t(t) * in.dim, norm, in.dim, in.eps, out + size_t(t) * in.dim);
            add_scaled(in.x + size_t(t) * in.dim, 1.0f, out + size_t(t) * in.dim, in.dim);
        }
        team.wait(size);
    }
};
