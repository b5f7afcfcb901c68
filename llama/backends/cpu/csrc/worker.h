// What threads of a call for a few tokens have, and what both halves of a layer do.
#pragma once
#include <array>

#include "plan.h"
#include "threads.h"

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
