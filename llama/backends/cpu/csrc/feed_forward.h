// Feed-forwards of a few tokens, and experts of which each token passes some.
#pragma once
#include "worker.h"

struct FeedForwardHalf : Worker {
    using Worker::products;

    void run(const Layer &w) {
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
};
